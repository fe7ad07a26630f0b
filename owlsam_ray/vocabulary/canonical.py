"""The standard form of a prompt, as OWL-ViT's evaluation has it."""

import re
import string

_TO_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


def canonical(text: str) -> str:
    """Lower case, and a space for whatever is no letter a…z, digit, dash or hash.

    Runs of spaces and of dashes become one, spaces at the ends go. A hash stays at the very beginning only: there it
    marks, in OWL-ViT's training, a text that gets no template. Letters beyond ASCII are lost, as in the original:
    `Hütte` becomes `h tte`. The original applies this to a whole prompt, after the template is filled.

    Returns:
        The text; empty when nothing of it is left.

    Source: google-research/scenic, projects/owl_vit/preprocessing/label_ops.py (`_canonicalize_string_tf`), whose lower
    case is ASCII's too. Equal on the 1648 class names of COCO, LVIS and Objects365.
    """
    text = re.sub(r"[^a-z0-9# -]", " ", text.translate(_TO_LOWER))
    text = re.sub(r"-+", "-", re.sub(r" +", " ", text)).strip(" ")
    return re.sub(r"(.)#+", r"\1", text)
