"""What to look for: categories, and the queries that ask for them.

A prompt is one text. A query is what the detector's class head is asked: it belongs to one label and is made of the
prompts of one name (one per template), of one text of the user's own, or of one exemplar.
"""

from owlsam_ray.vocabulary.resolve import Query, Vocabulary, resolve_vocabulary

__all__ = ["Query", "Vocabulary", "resolve_vocabulary"]
