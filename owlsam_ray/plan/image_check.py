"""`plan.verify`: check before a run whether every image exists, or decodes."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, Any, Literal

import pyarrow as pa

from owlsam_ray import storage
from owlsam_ray.config.base import MEGABYTE
from owlsam_ray.config.inference import DecodeConfig
from owlsam_ray.errors import ImageError, InputError, StorageSetupError
from owlsam_ray.fetch.images import check_data_uri, fetch_outcomes, setup_error
from owlsam_ray.fetch.packed import NotSetUpError, image_error
from owlsam_ray.inference.decode import decode_image
from owlsam_ray.schema import Container
from owlsam_ray.sources.listing import address_of
from owlsam_ray.storage.secrets import masked_url

_BATCH = 64
"""Images whose bytes are in memory at a time."""
_LOOKED_UP = 4096
"""Images whose existence is checked at a time."""


@dataclass(slots=True)
class Verification:
    """Result of the check: counts of images and failures."""

    images: int = 0
    failed: int = 0
    failed_by_reason: Counter[str] = field(default_factory=Counter)


def verify_images(
    tables: Iterable[pa.Table],
    mode: Literal["exists", "decode"],
    out: IO[bytes],
    *,
    threads: int,
    decode: DecodeConfig,
    show: Callable[[int], None] = lambda done: None,
) -> Verification:
    """Check every image of a listing.

    Args:
        tables: the listing, as `LISTING_SCHEMA`.
        mode: `exists` checks that every file exists (a tar or Parquet file once); `decode` reads and decodes images.
        out: receives one line of JSON for every image that fails: file_name, uri, reason, class.
        threads: number of parallel requests.
        decode: the run's limits on files and pixels.
        show: called with the number of images checked.

    Raises:
        StorageSetupError: credentials or a package for the storage are missing, and all images so far have failed.
            Later images just fail.
    """
    result = Verification()
    known: dict[str, ImageError | None] = {}
    with ThreadPoolExecutor(threads) as pool:
        for rows in _batches(tables, _LOOKED_UP if mode == "exists" else _BATCH):
            problems = _look_up(rows, known, pool) if mode == "exists" else _decode(rows, decode, threads, pool)
            if result.images == result.failed and (error := setup_error(rows, problems)) is not None:
                raise error  # nothing could be read so far
            for row, problem in zip(rows, problems, strict=True):
                result.images += 1
                if problem is not None:
                    result.failed += 1
                    result.failed_by_reason[problem.reason.split(":")[0]] += 1
                    line = {"file_name": row["file_name"], "uri": masked_url(row["uri"])}
                    line |= {"reason": problem.reason, "class": str(problem.failure_class)}
                    out.write(json.dumps(line).encode() + b"\n")
            show(result.images)
    return result


def _batches(tables: Iterable[pa.Table], size: int) -> Iterator[list[dict[str, Any]]]:
    for table in tables:
        for start in range(0, table.num_rows, size):
            yield table.slice(start, size).to_pylist()


def _look_up(
    rows: Sequence[dict[str, Any]], known: dict[str, ImageError | None], pool: ThreadPoolExecutor
) -> list[ImageError | None]:
    """Why each image does not exist; None if it does. Answers for files that hold many images are cached in `known`."""
    bad = [ImageError(row["member"]) if row["container"] == Container.BAD else None for row in rows]
    rest = [row for row, error in zip(rows, bad, strict=True) if error is None]
    uris = list(dict.fromkeys(uri for row in rest if (uri := address_of(row)) not in known))
    named_by_data = {address_of(row) for row in rest if row["container"] in (None, Container.ESCAPED)}
    found = dict(zip(uris, pool.map(lambda uri: _absence(uri, uri in named_by_data), uris), strict=True))
    known |= {uri: outcome for uri, outcome in found.items() if uri not in named_by_data}
    return [
        error or known.get(address_of(row)) or found.get(address_of(row)) for row, error in zip(rows, bad, strict=True)
    ]


def _absence(uri: str, is_named_by_data: bool) -> ImageError | None:
    try:
        if is_named_by_data:
            check_data_uri(uri)
        return None if storage.exists(uri) else ImageError("missing")
    except StorageSetupError as error:
        return NotSetUpError(f"no_access: {error}")
    except (OSError, InputError) as error:
        return image_error(error)


def _decode(
    rows: Sequence[dict[str, Any]], decode: DecodeConfig, threads: int, pool: ThreadPoolExecutor
) -> list[ImageError | None]:
    outcomes = fetch_outcomes(rows, {}, threads=threads, max_bytes=decode.max_file_mb * MEGABYTE)

    def look(outcome: bytes | ImageError) -> ImageError | None:
        if isinstance(outcome, ImageError):
            return outcome
        try:
            decode_image(outcome, stated_hw=None, max_pixels=decode.max_pixels)
        except ImageError as error:
            return error
        return None

    return list(pool.map(look, outcomes))
