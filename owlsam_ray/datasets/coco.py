"""COCO JSON + image root → listing. Annotations are not read here (`annotations.py`)."""

import json
from collections.abc import Iterator
from typing import Any

from owlsam_ray import storage
from owlsam_ray.datasets.source import MAX_IMAGE_ID, ImageRecord, Source, file_name_error, raise_offences
from owlsam_ray.errors import InputError
from owlsam_ray.settings import DataConfig

_OWN_FIELDS = {"id", "file_name", "height", "width"}
_LOOKED_UP = 20


def list_coco(config: DataConfig) -> Source:
    """List the images of a COCO file, in the file's order.

    Raises:
        InputError: the file cannot be read or is no COCO file; ids or file names repeat, are malformed, or leave the
            root; or none of a sample of the files exists under `data.images`.
    """
    url = config.annotations or ""
    return list_tree(read_tree(url), url=url, root=config.images)


def list_tree(tree: dict[str, Any], *, url: str, root: str) -> Source:
    """List the images of a COCO file that is read already, in the file's order.

    Args:
        tree: what `read_tree` gave.
        url: the file, for messages.
        root: what file names are relative to.

    Raises:
        InputError: as `list_coco`.
    """
    images = tree.get("images")
    if not isinstance(images, list) or not images:
        raise InputError(f"{url} lists no images: is it a COCO file with a non-empty `images`?")
    offences: list[str] = []
    records = list(_records(images, offences))
    raise_offences(url, offences, "Mend the file; ids and file names must be unique, and names stay below data.images.")
    _check_root(root, records)
    return Source(
        records=records,
        info=_of_type(tree, "info", dict, url),
        licenses=_of_type(tree, "licenses", list, url),
        categories=_of_type(tree, "categories", list, url),
    )


def read_tree(url: str) -> dict[str, Any]:
    """A COCO file as plain values, not yet checked.

    Raises:
        InputError: it cannot be read, or is no JSON object.
    """
    try:
        # NaN and Infinity are no JSON, and could not be written again by `reduce`.
        tree = json.loads(storage.read_bytes(url), parse_constant=_refuse_constant)
    except OSError as error:
        raise InputError(f"cannot read data.annotations {url}: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"{url} is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{url} is not a COCO file: it holds a {type(tree).__name__}, not an object")
    return tree


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _of_type(tree: dict[str, Any], key: str, kind: type, url: str) -> Any:
    value = tree.get(key)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise InputError(f"{url}: `{key}` is a {type(value).__name__}, not a {kind.__name__}")
    return value


def _records(images: list[Any], offences: list[str]) -> Iterator[ImageRecord]:
    """Valid records; what is wrong with the others is added to `offences`."""
    name_of: dict[int, str] = {}
    id_of: dict[str, int] = {}
    for position, image in enumerate(images):
        where = f"images[{position}]"
        if not isinstance(image, dict):
            offences.append(f"{where} is a {type(image).__name__}, not an object")
            continue
        image_id, name = image.get("id"), image.get("file_name")
        if not isinstance(image_id, int) or isinstance(image_id, bool) or not 0 <= image_id < MAX_IMAGE_ID:
            offences.append(f"{where}: id {image_id!r} is not an integer from 0 to 2^53")
        elif not isinstance(name, str) or file_name_error(name) is not None:
            offences.append(f"{where} (id {image_id}): {file_name_error(name)}: {name!r}")
        elif image_id in name_of:
            offences.append(f"{where}: id {image_id} is given to both {name_of[image_id]!r} and {name!r}")
        elif name in id_of:
            offences.append(f"{where}: {name!r} is listed twice, as id {id_of[name]} and as id {image_id}")
        elif not all(_is_length(image.get(key)) for key in ("height", "width")):
            offences.append(
                f"{where} ({name!r}): height {image.get('height')!r} or width {image.get('width')!r} is odd"
            )
        else:
            name_of[image_id], id_of[name] = name, image_id
            yield ImageRecord(
                image_id=image_id,
                file_name=name,
                height=image.get("height"),
                width=image.get("width"),
                extra={key: value for key, value in image.items() if key not in _OWN_FIELDS},
            )


def _is_length(value: object) -> bool:
    """Pixels, or not stated."""
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31)


def _check_root(root: str, records: list[ImageRecord]) -> None:
    """A wrong root is told now; single missing files become failed rows later."""
    step = max(1, len(records) // _LOOKED_UP)
    sample = [record.file_name for record in records[::step][:_LOOKED_UP]]
    if not any(storage.exists(storage.join(root, name)) for name in sample):
        raise InputError(
            f"none of {len(sample)} images looked up exists under data.images {root}; the first was "
            f"{storage.join(root, sample[0])}. Is data.images the folder that the file names are relative to?"
        )
