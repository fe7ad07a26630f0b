"""COCO files of any size: reading, statistics and cleaning."""
