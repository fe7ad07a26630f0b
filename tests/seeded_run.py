"""Write models without training, for a first run: `python -m tests.seeded_run DIR`."""

import argparse
import os
from pathlib import Path

from tests import seeded_mobile_sam, seeded_owlvit
from tests.runs import make_tiny_run


def main() -> None:
    """Write full-size weights that fit `jobs/coco_mini.yaml`, or a whole tiny run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tiny", action="store_true", help="64 drawn images, tiny models and a run.yaml instead")
    options = parser.parse_args()
    if options.tiny:
        make_tiny_run(options.directory.resolve(), num_images=64)
        return
    shared = Path(os.environ.get("OWLSAM_SHARED", Path(__file__).parents[2] / "shared"))
    seeded_owlvit.write_full(options.directory / "owlvit", shared)
    seeded_mobile_sam.write_full(options.directory / "mobile_sam.pt", shared)


if __name__ == "__main__":
    main()
