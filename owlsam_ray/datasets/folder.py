"""Every image file under a folder → listing."""

import logging
from collections import Counter

from owlsam_ray import storage
from owlsam_ray.datasets.files import ending_of, tell_left_out
from owlsam_ray.datasets.source import (
    DEFAULTS,
    ImageRecord,
    Listing,
    ListingOptions,
    file_name_error,
    raise_offences,
    tables_of,
)
from owlsam_ray.errors import InputError
from owlsam_ray.settings import DataConfig

_log = logging.getLogger(__name__)
_TOLD_EVERY = 100_000


def list_folder(config: DataConfig, options: ListingOptions = DEFAULTS) -> Listing:
    """List image files recursively, ordered by their full relative path.

    Files and folders whose name begins with a dot are left out. Linked folders are not entered, so a loop of links does
    no harm; linked files are taken.

    Raises:
        OSError: a folder cannot be listed; no image is left out for that.
        InputError: the folder does not exist, or holds no image file; a name is not valid Unicode.
    """
    root = config.images or ""
    if not storage.is_directory(root):
        if not storage.exists(root):
            raise InputError(f"data.images {root} does not exist")
        raise InputError(f"data.images {root} is not a folder; for a single file, name the folder that holds it")
    suffixes = tuple(suffix.lower() for suffix in config.suffixes)
    found: list[tuple[str, int | None]] = []
    others: Counter[str] = Counter()
    for name, num_bytes in storage.walk_files(root):
        if name.lower().endswith(suffixes):
            found.append((name, num_bytes))
            if len(found) % _TOLD_EVERY == 0:
                _log.info("found %s image files so far", f"{len(found):,}")
        else:
            others[ending_of(name)] += 1
    if not found:
        raise InputError(
            f"data.images {root} holds no image file: {others.total()} files, none ending in {', '.join(suffixes)} "
            "(data.suffixes)"
        )
    tell_left_out(f"data.images {root}", others)
    found.sort()
    offences = [f"{name!r}: {reason}" for name, _ in found if (reason := file_name_error(name)) is not None]
    raise_offences(root, offences, "Rename these files.")
    records = (ImageRecord(image_id=None, file_name=name, num_bytes=num_bytes) for name, num_bytes in found)
    return Listing(tables=tables_of(records, root), total=len(found), has_ids=False)
