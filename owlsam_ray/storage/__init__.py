"""Read and write files, whole or not at all, on disks and any fsspec URL, with retries when storage is busy.

Every request to a remote store is repeated after throttling, server errors, cut connections and timeouts, as set by
`configure`. A request that fails for good raises an `OSError` (`FileNotFoundError` for 404, `PermissionError` for 403,
`TimeoutError`) that names URL, host, answer and number of tries; without credentials a `StorageSetupError`; for a URL
that no library accepts an `InputError`. Listings are never taken from a cache.
"""

from owlsam_ray.storage.answers import Body
from owlsam_ray.storage.faults import TooLargeError, described, warn_once
from owlsam_ray.storage.listing import TEMPORARY_PREFIX, glob_files, list_names, walk_files
from owlsam_ray.storage.reading import exists, is_directory, num_bytes, open_input, read_bytes, read_range, read_whole
from owlsam_ray.storage.retrying import (
    StoragePolicy,
    configure,
    forget_clients,
    is_local,
    join,
    open_filesystem,
    policy,
)
from owlsam_ray.storage.uploads import open_stream
from owlsam_ray.storage.writing import (
    free_bytes,
    make_directory,
    move,
    open_atomic,
    remove,
    remove_stale_temporaries,
    temporary_files,
    try_writing,
    write_atomic,
)

__all__ = [
    "TEMPORARY_PREFIX",
    "Body",
    "StoragePolicy",
    "TooLargeError",
    "configure",
    "described",
    "exists",
    "forget_clients",
    "free_bytes",
    "glob_files",
    "is_directory",
    "is_local",
    "join",
    "list_names",
    "make_directory",
    "move",
    "num_bytes",
    "open_atomic",
    "open_filesystem",
    "open_input",
    "open_stream",
    "policy",
    "read_bytes",
    "read_range",
    "read_whole",
    "remove",
    "remove_stale_temporaries",
    "temporary_files",
    "try_writing",
    "walk_files",
    "warn_once",
    "write_atomic",
]
