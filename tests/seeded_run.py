"""Write full-size models without training that fit `jobs/coco_mini.yaml`: `python -m tests.seeded_run DIR`."""

import argparse
import os
from pathlib import Path

from tests import seeded_mobile_sam, seeded_owlvit


def main() -> None:
    """Write both models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    shared = Path(os.environ.get("OWLSAM_SHARED", Path(__file__).parents[2] / "shared"))
    seeded_owlvit.write_full(options.directory / "owlvit", shared)
    seeded_mobile_sam.write_full(options.directory / "mobile_sam.pt", shared)


if __name__ == "__main__":
    main()
