"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the checkout, or at OWLSAM_SHARED."""
    root = Path(os.environ.get("OWLSAM_SHARED", Path(__file__).parents[2] / "shared"))
    if not (root / "golden").is_dir():
        pytest.skip(f"no reference data at {root}: set OWLSAM_SHARED")
    return root
