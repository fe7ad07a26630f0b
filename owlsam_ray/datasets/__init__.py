"""Sources of images: a listing → manifest rows. One file per source, one contract (`source.py`)."""

from owlsam_ray.datasets.coco import list_coco
from owlsam_ray.datasets.folder import list_folder
from owlsam_ray.datasets.source import ImageRecord, Source
from owlsam_ray.settings import DataConfig

__all__ = ["ImageRecord", "Source", "list_images"]

_SOURCES = {"coco": list_coco, "folder": list_folder}


def list_images(config: DataConfig) -> Source:
    """List the images that a config names.

    Raises:
        InputError: see the sources.
    """
    return _SOURCES[config.source](config)
