"""When two names are the same."""


def fold(text: str) -> str:
    """Two texts with the same fold are the same to CLIP's tokenizer: case and runs of spaces do not count."""
    return " ".join(text.lower().split())


def fold_loosely(text: str) -> str:
    """Underscores do not count either: `aerosol can` is LVIS's `aerosol_can`."""
    return fold(text.replace("_", " "))
