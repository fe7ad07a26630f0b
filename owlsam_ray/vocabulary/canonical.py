"""Canonical form of a prompt, as in OWL-ViT's evaluation."""

import re
import string

_TO_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


def canonical(text: str) -> str:
    """Lower-case a text and replace every character but letters a…z, digits, dashes and hashes by a space.

    Runs of spaces and runs of dashes become one, spaces at the ends are removed. A hash is kept only at the very
    beginning: there, in OWL-ViT's training, it marks a text that gets no template. Letters beyond ASCII are lost, as in
    the original: `Hütte` becomes `h tte`. The original applies this to a whole prompt, after filling the template.

    Returns:
        The text; empty when nothing of it is left.

    Source: google-research/scenic, projects/owl_vit/preprocessing/label_ops.py (`_canonicalize_string_tf`), whose lower
    case is also ASCII only. Equal on the 1648 class names of COCO, LVIS and Objects365.
    """
    text = re.sub(r"[^a-z0-9# -]", " ", text.translate(_TO_LOWER))
    text = re.sub(r"-+", "-", re.sub(r" +", " ", text)).strip(" ")
    return re.sub(r"(.)#+", r"\1", text)
