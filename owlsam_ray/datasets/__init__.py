"""Sources of images: a listing → manifest rows. One file per source, one contract (`source.py`)."""

from owlsam_ray.datasets.coco import list_coco
from owlsam_ray.datasets.folder import list_folder
from owlsam_ray.datasets.lvis import list_lvis
from owlsam_ray.datasets.objects365 import list_objects365
from owlsam_ray.datasets.source import DEFAULTS, Container, ImageRecord, Listing, ListingOptions
from owlsam_ray.datasets.table import list_table
from owlsam_ray.datasets.webdataset import list_webdataset
from owlsam_ray.settings import DataConfig

__all__ = ["Container", "ImageRecord", "Listing", "ListingOptions", "list_images"]

_SOURCES = {
    "coco": list_coco,
    "lvis": list_lvis,
    "objects365": list_objects365,
    "folder": list_folder,
    "table": list_table,
    "webdataset": list_webdataset,
}


def list_images(config: DataConfig, options: ListingOptions = DEFAULTS) -> Listing:
    """List the images that a config names.

    Raises:
        InputError: see the sources; what stands in their tables is checked while these are read.
    """
    return _SOURCES[config.source](config, options)
