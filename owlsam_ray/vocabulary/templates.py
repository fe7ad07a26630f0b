"""Prompt templates: sentences with a place for a category's name."""

from collections.abc import Sequence

HOLE = "{}"

TEMPLATES: dict[str, tuple[str, ...]] = {
    "none": (HOLE,),
    "photo": (f"a photo of a {HOLE}",),
    "clip_best7": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
}
"""Templates by the name that `vocabulary.templates` uses.

`clip_best7`: the seven that CLIP's authors chose on ImageNet (openai/CLIP, notebooks/Prompt_Engineering_for_ImageNet),
which OWL-ViT's LVIS evaluation averages (google-research/scenic, projects/owl_vit/evaluator.py).
"""


def fill(templates: str | Sequence[str], name: str) -> tuple[str, ...]:
    """One prompt per template, in the templates' order; braces in a name have no meaning.

    Args:
        templates: a key of `TEMPLATES`, or the sentences.
        name: the text that replaces the hole.
    """
    sentences = TEMPLATES[templates] if isinstance(templates, str) else templates
    return tuple(sentence.replace(HOLE, name) for sentence in sentences)
