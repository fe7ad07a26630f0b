"""What to look for: categories, and the queries that the detector runs for them.

A prompt is one text. A query is one input of the detector's class head: it belongs to one label and consists of the
prompts of one name (one per template), of one of the user's own texts, or of one exemplar.
"""

from owlsam_ray.vocabulary.resolve import Query, Vocabulary, resolve_vocabulary

__all__ = ["Query", "Vocabulary", "resolve_vocabulary"]
