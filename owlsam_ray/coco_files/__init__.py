"""COCO files of any size: reading, statistics, cleaning."""
