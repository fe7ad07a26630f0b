"""Labelled pictures: boxes, names, scores and masks, drawn over the pixels that they describe; one, or a sheet of them.

Letters: H W pixels, N labels. Everything is drawn at the size of the sheet, so that small objects stay readable.
"""

import colorsys
import contextlib
import io
import json
import math
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from owlsam_ray import storage
from owlsam_ray.errors import ImageError, InputError, one_line
from owlsam_ray.inference.decode import decode_image
from owlsam_ray.ops.masks import decode_rle

Colour = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]

CELL = 480
"""Long side of a picture on a sheet, in pixels."""
PREVIEW_MARK = "owlsam-ray"
"""Stands in every PNG that is written here: such a file may be written again."""
_GAP, _CAPTION = 12, 22
_PAPER, _INK = (255, 255, 255), (70, 70, 70)
_FONT = 14
_PAD = 2
"""Pixels around the text of a tag."""
_LINE = 2
"""Pixels of a box's line; outside of it lies one more that stands out from its colour."""
_MASK_ALPHA = 0.5
_MAX_PIXELS = 200_000_000


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """A picture and its labels, best first."""

    pixels: NDArray[np.uint8]
    """(H, W, 3) RGB."""
    boxes_xyxy: NDArray[np.float32]
    """(N, 4) in pixels, half-open."""
    names: tuple[str, ...]
    """N category names."""
    scores: NDArray[np.float32]
    """(N,)."""
    masks: NDArray[np.bool_]
    """(N, H, W); all False where a label has none."""
    caption: str = ""
    """Stands under the picture."""


def read_labelled(annotations: str, images: str, *, min_score: float, count: int | None = None) -> list[LabelledImage]:
    """Pictures of a COCO file with their labels, evenly spread over the file; also those in which nothing was found.

    Args:
        annotations: path or fsspec URL of the COCO file; annotations without a score count as certain.
        images: root of its `file_name`s.
        min_score: labels with a lower score are left out.
        count: at most so many pictures; default: all.

    Raises:
        InputError: the file is no JSON, or an image cannot be read; names it.
    """
    try:
        tree = json.loads(storage.read_bytes(annotations))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{annotations} is not valid JSON: {one_line(error)}") from None
    names = {category["id"]: category["name"] for category in tree["categories"]}
    labels: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in tree["annotations"]:
        if annotation.get("score", 1.0) >= min_score:
            labels[annotation["image_id"]].append(annotation)
    listed = tree["images"]
    wanted = len(listed) if count is None else min(count, len(listed))
    chosen = [listed[index * len(listed) // wanted] for index in range(wanted)]
    return [_picture(image, labels[image["id"]], names, images) for image in chosen]


def _picture(image: dict[str, Any], labels: list[dict[str, Any]], names: dict[int, str], root: str) -> LabelledImage:
    size_hw = (image["height"], image["width"])
    url = storage.join(root, image["file_name"])
    try:
        pixels = decode_image(storage.read_bytes(url), stated_hw=size_hw, max_pixels=_MAX_PIXELS).pixels
    except (OSError, ImageError) as error:
        raise InputError(f"cannot draw {url}: {error}") from None
    labels = sorted(labels, key=lambda label: -label.get("score", 1.0))
    boxes = np.array([label["bbox"] for label in labels], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return label_picture(
        pixels,
        boxes,
        names=[names[label["category_id"]] for label in labels],
        scores=[label.get("score", 1.0) for label in labels],
        rles=[label["segmentation"]["counts"].encode("ascii") if "segmentation" in label else None for label in labels],
        caption=image["file_name"],
    )


def label_picture(
    pixels: NDArray[np.uint8],
    boxes_xyxy: NDArray[np.float32],
    *,
    names: Sequence[str],
    scores: Sequence[float],
    rles: Sequence[bytes | None],
    caption: str,
    long_side: int = CELL,
) -> LabelledImage:
    """A picture and its labels at the size at which they are drawn, so that masks of a huge one fit into memory.

    Args:
        pixels: (H, W, 3) RGB.
        boxes_xyxy: (N, 4) in pixels.
        names: N category names.
        scores: N.
        rles: N counts of compressed RLE of (H, W) masks; None where a label has no mask.
        caption: stands under the picture.
        long_side: in pixels; smaller pictures stay as they are.

    Raises:
        ValueError: an RLE does not belong to the picture.
    """
    height, width = pixels.shape[:2]
    scale = min(1.0, long_side / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    masks = np.zeros((len(rles), size[1], size[0]), np.bool_)
    for mask, rle in zip(masks, rles, strict=True):
        if rle is not None:
            mask[:] = _scaled(decode_rle(rle, (height, width)), size).numpy()
    if scale < 1.0:
        pixels = np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
        boxes_xyxy = boxes_xyxy * np.array([size[0] / width, size[1] / height] * 2, np.float32)
    return LabelledImage(pixels, boxes_xyxy, tuple(names), np.array(scores, np.float32), masks, caption)


def was_drawn_here(path: Path) -> bool:
    """Whether a file is a PNG of `write_contact_sheet`."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return image.info.get("Software") == PREVIEW_MARK
    except (OSError, ValueError, SyntaxError):
        return False


def write_contact_sheet(images: Sequence[LabelledImage], path: Path, *, columns: int, long_side: int = CELL) -> None:
    """Draw pictures into a grid, row by row, and write it as PNG, whole or not at all.

    Args:
        images: at least one; each is scaled to the same long side.
        path: of the PNG.
        columns: pictures in a row.
        long_side: of a picture, in pixels.

    Raises:
        ValueError: there is no picture.
    """
    if not images:
        raise ValueError("a contact sheet needs at least one picture")
    columns = min(columns, len(images))
    drawn = [draw_labels(image, long_side=long_side) for image in images]
    width = max(picture.width for picture in drawn)
    rows = [drawn[start : start + columns] for start in range(0, len(drawn), columns)]
    heights = [max(picture.height for picture in row) + _CAPTION for row in rows]
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, sum(heights) + (len(rows) + 1) * _GAP), _PAPER)
    canvas = ImageDraw.Draw(sheet)
    top = _GAP
    captions = iter(image.caption for image in images)
    for row, height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            left = _GAP + column * (width + _GAP) + (width - picture.width) // 2
            sheet.paste(picture, (left, top))
            caption = next(captions)
            canvas.text((left, top + picture.height + 4), caption, fill=_INK, font=_font(caption, _FONT))
        top += height + _GAP
    data = io.BytesIO()
    mark = PngInfo()
    mark.add_text("Software", PREVIEW_MARK)
    sheet.save(data, "PNG", pnginfo=mark)
    storage.write_atomic(str(path), data.getbuffer())


def draw_labels(picture: LabelledImage, *, long_side: int = CELL) -> Image.Image:
    """One picture at the size of the sheet, with its labels; lines and letters grow with it."""
    height, width = picture.pixels.shape[:2]
    scale = long_side / max(height, width)
    line, font_size = max(_LINE, round(long_side / 450)), max(_FONT, round(long_side / 70))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = Image.fromarray(picture.pixels).resize(size, Image.Resampling.BICUBIC)
    if len(picture.names) == 0:
        return image
    colours = [colour_of(name) for name in picture.names]
    canvas = _draw_masks(torch.from_numpy(np.array(image)).permute(2, 0, 1), picture, colours, size)
    # Around the box, not on it: a line of two pixels hides much of an object of twenty.
    halos, lines = _boxes_on(picture, size, margin=line + 1), _boxes_on(picture, size, margin=line)
    canvas = draw_bounding_boxes(canvas, halos, colors=[_halo(colour) for colour in colours], width=line + 1)
    canvas = draw_bounding_boxes(canvas, lines, colors=list(colours), width=line)
    image = Image.fromarray(canvas.permute(1, 2, 0).numpy())
    texts = [f"{name} {score:.2f}" for name, score in zip(picture.names, picture.scores, strict=True)]
    outer = [(x0, y0, x1 + 1, y1 + 1) for x0, y0, x1, y1 in halos.tolist()]
    _draw_tags(image, texts, colours, outer, font_size=font_size)
    return image


def _draw_masks(canvas: Tensor, picture: LabelledImage, colours: Sequence[Colour], size: tuple[int, int]) -> Tensor:
    """(3, h, w) uint8 with the masks over it, the best one on top.

    One by one: drawn in one call, torchvision paints black where masks overlap, and a float copy of each is in memory.
    A pixel is made pale once; a mask that several labels share is drawn for the best of them.
    """
    covered = torch.zeros(canvas.shape[1:], dtype=torch.bool)
    edges: list[tuple[Tensor, Colour]] = []
    seen: set[bytes] = set()
    for mask, colour in zip(picture.masks, colours, strict=True):
        scaled, key = _scaled(mask, size), mask.tobytes()
        if key in seen or not scaled.any():
            continue
        seen.add(key)
        visible = scaled & ~covered
        covered |= scaled
        canvas = draw_segmentation_masks(canvas, visible[None], alpha=_MASK_ALPHA, colors=[_pale(colour)])
        edges.append((scaled & ~_shrunk(scaled[None])[0], colour))
    for edge, colour in reversed(edges):
        canvas = draw_segmentation_masks(canvas, edge[None], alpha=1.0, colors=[_halo(colour)])
    return canvas


def colour_of(name: str) -> Colour:
    """A category's colour: the one that its name mentions, else one of its own, the same in every picture."""
    for word in name.lower().split():
        if word in ImageColor.colormap:
            return ImageColor.getrgb(word)[:3]
    hue = zlib.crc32(name.encode()) / 2**32
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75, 1.0)
    return (round(255 * red), round(255 * green), round(255 * blue))


def _halo(colour: Colour) -> Colour:
    """What stands out from a colour: black or white."""
    luma = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    return (0, 0, 0) if luma > 110 else (255, 255, 255)


def _pale(colour: Colour) -> Colour:
    """Mostly white: shows on an object of the same colour too."""
    red, green, blue = (round(255 - 0.25 * (255 - channel)) for channel in colour)
    return (red, green, blue)


def _scaled(mask: NDArray[np.bool_], size: tuple[int, int]) -> Tensor:
    """(H, W) mask at another (width, height), with smooth edges."""
    grey = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(grey) >= 128)


def _shrunk(masks: Tensor) -> Tensor:
    """(N, H, W) masks without the pixels at their edge; the picture's border is no edge."""
    outside = torch.nn.functional.max_pool2d((~masks).float()[:, None], 3, stride=1, padding=1)[:, 0]
    return outside == 0


def _boxes_on(picture: LabelledImage, size: tuple[int, int], *, margin: int) -> Tensor:
    """(N, 4) int32 first and last pixel of each box on the scaled picture, with a margin around it."""
    height, width = picture.pixels.shape[:2]
    factors = np.array([size[0] / width, size[1] / height] * 2, np.float32)
    last = np.array([size[0] - 1, size[1] - 1] * 2, np.float32)
    around = np.array([-margin, -margin, margin - 1, margin - 1], np.float32)
    boxes = np.clip(np.rint(picture.boxes_xyxy * factors) + around, 0, last)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2])
    return torch.from_numpy(boxes).int()


def _draw_tags(
    image: Image.Image, texts: list[str], colours: list[Colour], boxes: list[Rectangle], *, font_size: int
) -> None:
    """A tag with each text beside its box, where it covers no other tag if there is such a place."""
    canvas = ImageDraw.Draw(image)
    taken: list[Rectangle] = []
    for text, colour, box in zip(texts, colours, boxes, strict=True):
        others = [other for other in boxes if other is not box]
        font = _font(text, font_size)
        wide = math.ceil(font.getlength(text)) + 2 * _PAD
        high = font_size + 2 * _PAD
        place = _free_place((wide, high), box, others, taken, image.size)
        taken.append(place)
        canvas.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=colour, outline=_halo(colour))
        canvas.text((place[0] + _PAD, place[1] + high // 2), text, fill=_halo(colour), font=font, anchor="lm")


def _font(text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own letters, which are ASCII; for other texts one of the machine's fonts where it has a common one."""
    if not text.isascii():
        for name in ("DejaVuSans.ttf", "NotoSans-Regular.ttf"):
            with contextlib.suppress(OSError):
                return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def _free_place(
    tag: tuple[int, int], box: Rectangle, others: Sequence[Rectangle], taken: Sequence[Rectangle], size: tuple[int, int]
) -> Rectangle:
    """Where a tag of (width, height) covers least of other tags and other boxes: above its box, below, beside, inside.

    A small box is hidden by what would hardly touch a large one, so boxes count by the share that is covered.
    """
    wide, high = tag
    x0, y0, x1, y1 = box
    corners = [
        (x0, y0 - high), (x1 - wide, y0 - high), (x0, y1), (x1 - wide, y1),
        (x1, y0), (x0 - wide, y0), (x1, y1 - high), (x0 - wide, y1 - high), (x0, y0), (x0, y1 - high),
    ]  # fmt: skip

    def covered(place: Rectangle) -> float:
        tags = sum(_shared(place, other) for other in taken) / (wide * high)
        return 2 * tags + sum(_shared(place, other) / _shared(other, other) for other in others)

    lefts = [max(0, min(left, size[0] - wide)) for left, _ in corners]
    tops = [max(0, min(top, size[1] - high)) for _, top in corners]
    # Of equally good ones the first.
    return min(((x, y, x + wide, y + high) for x, y in zip(lefts, tops, strict=True)), key=covered)


def _shared(a: Rectangle, b: Rectangle) -> int:
    """Pixels that two half-open rectangles share."""
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0, wide) * max(0, high)
