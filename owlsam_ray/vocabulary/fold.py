"""Fold names for comparison: when two names count as the same."""


def fold(text: str) -> str:
    """Fold case and runs of spaces: texts with the same fold are the same to CLIP's tokenizer."""
    return " ".join(text.lower().split())


def fold_loosely(text: str) -> str:
    """Fold underscores to spaces as well: `aerosol can` equals LVIS's `aerosol_can`."""
    return fold(text.replace("_", " "))
