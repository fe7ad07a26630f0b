"""Validates and reads fields of the image records of COCO files."""

from typing import Any

from owlsam_ray.coco_files.stated_size import stated_side
from owlsam_ray.errors import shown
from owlsam_ray.schema import MAX_IMAGE_ID


def image_error(image: Any, *, has_ids: bool = True) -> str | None:
    """What is wrong with an image record, apart from its name; None when it is valid.

    Args:
        image: the record.
        has_ids: ids must be integers; if false, they may be texts.
    """
    if not isinstance(image, dict):
        return f" is a {type(image).__name__}, not an object"
    number = image.get("id")
    if not (type(number) is int and 0 <= number < MAX_IMAGE_ID) and (has_ids or type(number) not in (int, str)):
        return f": id {shown(number)} is not an integer from 0 to 2^53"
    try:
        stated_side(image.get("height"))
        stated_side(image.get("width"))
    except ValueError:
        sizes = f"height {shown(image.get('height'))} or width {shown(image.get('width'))}"
        return f" ({shown(image.get('file_name'))}): {sizes} is not a whole number of pixels"
    return None


def text_of(image: dict[str, Any], key: str) -> str | None:
    """A field that is a non-empty text; None otherwise."""
    value = image.get(key)
    return value if isinstance(value, str) and value else None


def url_parts(image: dict[str, Any]) -> tuple[str, str] | None:
    """The folder and name at the end of `coco_url`, such as ("val2017", "000000000139.jpg"); None without them."""
    parts = (text_of(image, "coco_url") or "").split("?")[0].split("/")
    return (parts[-2], parts[-1]) if len(parts) >= 4 and parts[-2] and parts[-1] else None
