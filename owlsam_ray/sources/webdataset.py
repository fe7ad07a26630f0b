"""Lists the image members of plain tar files; each file is indexed once, and nothing is extracted."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence

import pyarrow as pa

from owlsam_ray.config.data import DataConfig
from owlsam_ray.errors import InputError, raise_problems, shown
from owlsam_ray.parallel.processes import in_order
from owlsam_ray.sources.files import check_schemes, expand_files, relative_names, warn_of_left_out
from owlsam_ray.sources.listing import DEFAULTS, Listing, ListingOptions
from owlsam_ray.sources.tar_index import TarFile, TarIndex, compressed, index_tar

_log = logging.getLogger(__name__)

_COMPRESSED = {
    (".gz", ".tgz"): "gzip",
    (".bz2", ".tbz", ".tbz2"): "bzip2",
    (".xz", ".txz"): "xz",
    (".zst", ".tzst"): "zstd",
}


def list_webdataset(config: DataConfig, options: ListingOptions = DEFAULTS) -> Listing:
    """List the image members of tar files, tar by tar and in the order of each.

    A file name is the path of the tar below the common folder of all tars, followed by the member's name; the split is
    that path. Every member with an ending in `data.suffixes` is an image, so a sample of `0001.jpg` and `0001.seg.png`
    gives two images. Members of other kinds, hidden ones (`._0001.jpg`), links, devices and sparse files are left out
    and counted. Unsafe names are quoted (`row_names`): a member is read by its bytes, so its name does not matter.

    Raises:
        InputError: a pattern matches nothing; the name of a tar says that it is compressed, or is not valid Unicode.
            While the tables are read, at their end and all together: tars that are missing, not tar files, or
            compressed, and tars that are truncated or damaged unless `options.keep_whole`; or no tar holds an image.
        OSError: a storage failed.
    """
    urls = expand_files(config.files)
    check_schemes(urls)
    names = relative_names(urls)
    problems = []
    for url, name in zip(urls, names, strict=True):
        kind = next((kind for endings, kind in _COMPRESSED.items() if url.lower().endswith(endings)), None)
        if kind is not None:
            problems.append(f"{url} {compressed(kind)}")
        elif (reason := _name_error(name)) is not None:
            problems.append(f"{shown(url)}: {reason}; rename it, or write its path without . and .. parts")
    raise_problems("data.files", problems, "Images are taken from plain .tar files.")
    suffixes = tuple(suffix.lower() for suffix in config.suffixes)
    files = [TarFile(url, name, suffixes) for url, name in zip(urls, names, strict=True)]
    return Listing(tables=_tables(files, options), has_ids=False)


def _name_error(name: str) -> str | None:
    """Why the name of a tar file, which may be quoted, cannot be used; None when it can."""
    if "\0" in name or any("\ud800" <= letter <= "\udfff" for letter in name):
        return "its name holds a NUL or is not valid Unicode"
    if any(part in (".", "..") for part in name.split("/")):
        return "its name leaves the root"
    return None


def _in_memory(file: TarFile) -> bool:
    return file.url.startswith("memory:")


def _tables(files: Sequence[TarFile], options: ListingOptions) -> Iterator[pa.Table]:
    refused: list[str] = []
    damaged: list[str] = []
    images = others = 0
    endings: Counter[str] = Counter()
    for index in in_order(index_tar, files, options.workers, apart=not any(_in_memory(each) for each in files)):
        url = index.file.url
        if index.refusal is not None:
            refused.append(f"{url} {index.refusal}")
            continue
        if index.damage is not None:
            damaged.append(f"{url} {index.damage}, after {index.members} whole members")
        _warn_of_gaps(index, keep_whole=options.keep_whole)
        yield from index.tables
        images += index.images
        others += index.others
        endings += index.endings
    warn_of_left_out("data.files", endings)
    way_out = "Fix these files."
    if damaged and not options.keep_whole:
        way_out = (
            "Copy the damaged files again, or list only the members before the damage: plan.damaged_files=keep_whole."
        )
        refused += damaged
    raise_problems("data.files", refused, way_out)
    if images == 0:
        raise InputError(
            f"data.files holds no image: none of {others} members of {len(files)} tar files ends in "
            f"{', '.join(files[0].suffixes)} (data.suffixes) and is visible (no name or folder begins with a dot)"
        )


def _warn_of_gaps(index: TarIndex, *, keep_whole: bool) -> None:
    """Warn about what a tar file lacks, or which members are left out."""
    url = index.file.url
    if index.damage is not None:
        if keep_whole:
            _log.warning("%s %s: %s images before that are listed", url, index.damage, index.images)
    elif index.unmarked:
        _log.warning("%s has no end marker: its %s members are whole, but more may be missing", url, index.members)
    if index.odd:
        kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(index.odd.items()))
        _log.warning("%s: members without bytes of their own are left out (%s)", url, kinds)
    if index.images == 0 and index.damage is None:
        _log.warning("%s holds no image among its %s members", url, index.members)
    _log.debug("%s: %s images, %s other members", url, index.images, index.others)
