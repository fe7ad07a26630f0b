"""Sources of images: each lists a dataset as rows for the manifest, under the contract of `listing.py`."""

from owlsam_ray.config.data import DataConfig
from owlsam_ray.sources.coco import list_coco
from owlsam_ray.sources.folder import list_folder
from owlsam_ray.sources.listing import DEFAULTS, ImageRecord, Listing, ListingOptions
from owlsam_ray.sources.lvis import list_lvis
from owlsam_ray.sources.objects365 import list_objects365
from owlsam_ray.sources.table import list_table
from owlsam_ray.sources.webdataset import list_webdataset

__all__ = ["ImageRecord", "Listing", "ListingOptions", "list_images"]

_SOURCES = {
    "coco": list_coco,
    "lvis": list_lvis,
    "objects365": list_objects365,
    "folder": list_folder,
    "table": list_table,
    "webdataset": list_webdataset,
}


def list_images(config: DataConfig, options: ListingOptions = DEFAULTS) -> Listing:
    """List the images that the configuration names.

    Raises:
        InputError: see the sources; the content of their tables is checked while these are read.
    """
    return _SOURCES[config.source](config, options)
