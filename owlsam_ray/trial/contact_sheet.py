"""Draw labelled images with boxes, names, scores and masks: a single image, or a contact sheet of several.

Shapes: H, W pixels, N labels. Everything is drawn at the scale of the sheet, so that labels of small objects stay
readable.
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
"""Long side of an image on a sheet, in pixels."""
PREVIEW_MARK = "owlsam-ray"
"""Marker in every PNG written by this module: such a file may be overwritten."""
_GAP, _CAPTION = 12, 22
_PAPER, _INK = (255, 255, 255), (70, 70, 70)
_FONT = 14
_PAD = 2
"""Padding around the text of a tag, in pixels."""
_LINE = 2
"""Line width of a box in pixels; one more pixel outside the line has a contrasting colour."""
_MASK_ALPHA = 0.5
_MAX_PIXELS = 200_000_000


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """An image and its labels, best first."""

    pixels: NDArray[np.uint8]
    """(H, W, 3) RGB."""
    boxes_xyxy: NDArray[np.float32]
    """(N, 4) in pixels, half-open."""
    names: tuple[str, ...]
    """N category names."""
    scores: NDArray[np.float32]
    """(N,)."""
    masks: NDArray[np.bool_]
    """(N, H, W); all False for a label without a mask."""
    caption: str = ""
    """Text below the image."""


def read_labelled(annotations: str, images: str, *, min_score: float, count: int | None = None) -> list[LabelledImage]:
    """Read images of a COCO file with their labels, evenly spread over the file, including images without labels.

    Args:
        annotations: path or fsspec URL of the COCO file; annotations without a score count as score 1.
        images: root directory of its `file_name`s.
        min_score: labels with a lower score are left out.
        count: maximum number of images; default: all.

    Raises:
        InputError: the file is not JSON, or an image cannot be read; the message names it.
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
    """Scale an image and its labels down to the size at which they are drawn, so that masks of huge images fit memory.

    Args:
        pixels: (H, W, 3) RGB.
        boxes_xyxy: (N, 4) in pixels.
        names: N category names.
        scores: N scores.
        rles: N compressed RLE counts of (H, W) masks; None for a label without a mask.
        caption: text below the image.
        long_side: maximum long side in pixels; smaller images are not scaled.

    Raises:
        ValueError: an RLE does not match the size of the image.
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
    """Whether a file is a PNG written by `write_contact_sheet`."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return image.info.get("Software") == PREVIEW_MARK
    except (OSError, ValueError, SyntaxError):
        return False


def write_contact_sheet(images: Sequence[LabelledImage], path: Path, *, columns: int, long_side: int = CELL) -> None:
    """Draw images in a grid, row by row, and write it as PNG atomically.

    Args:
        images: at least one image; each is scaled to the same long side.
        path: path of the PNG.
        columns: maximum number of images in a row.
        long_side: long side of each image in pixels.

    Raises:
        ValueError: there are no images.
    """
    if not images:
        raise ValueError("a contact sheet needs at least one image")
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
    """Draw one image at the scale of the sheet with its labels; line width and font size grow with the scale."""
    height, width = picture.pixels.shape[:2]
    scale = long_side / max(height, width)
    line, font_size = max(_LINE, round(long_side / 450)), max(_FONT, round(long_side / 70))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = Image.fromarray(picture.pixels).resize(size, Image.Resampling.BICUBIC)
    if len(picture.names) == 0:
        return image
    colours = [colour_of(name) for name in picture.names]
    canvas = _draw_masks(torch.from_numpy(np.array(image)).permute(2, 0, 1), picture, colours, size)
    # Around the box, not on it: a line of two pixels hides much of an object of twenty pixels.
    halos, lines = _boxes_on(picture, size, margin=line + 1), _boxes_on(picture, size, margin=line)
    canvas = draw_bounding_boxes(canvas, halos, colors=[_halo(colour) for colour in colours], width=line + 1)
    canvas = draw_bounding_boxes(canvas, lines, colors=list(colours), width=line)
    image = Image.fromarray(canvas.permute(1, 2, 0).numpy())
    texts = [f"{name} {score:.2f}" for name, score in zip(picture.names, picture.scores, strict=True)]
    outer = [(x0, y0, x1 + 1, y1 + 1) for x0, y0, x1, y1 in halos.tolist()]
    _draw_tags(image, texts, colours, outer, font_size=font_size)
    return image


def _draw_masks(canvas: Tensor, picture: LabelledImage, colours: Sequence[Colour], size: tuple[int, int]) -> Tensor:
    """Draw the masks over a (3, h, w) uint8 canvas, the best one on top.

    They are drawn one by one, because in a single call torchvision paints overlaps black and holds a float copy of each
    mask in memory. A pixel is made pale only once; a mask shared by several labels is drawn for the best of them.
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
    """Colour of a category, the same in every image: the one its name mentions, else one derived from the name."""
    for word in name.lower().split():
        if word in ImageColor.colormap:
            return ImageColor.getrgb(word)[:3]
    hue = zlib.crc32(name.encode()) / 2**32
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75, 1.0)
    return (round(255 * red), round(255 * green), round(255 * blue))


def _halo(colour: Colour) -> Colour:
    """Black or white, whichever contrasts with a colour."""
    luma = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    return (0, 0, 0) if luma > 110 else (255, 255, 255)


def _pale(colour: Colour) -> Colour:
    """Make a colour mostly white, so that it is visible on an object of the same colour too."""
    red, green, blue = (round(255 - 0.25 * (255 - channel)) for channel in colour)
    return (red, green, blue)


def _scaled(mask: NDArray[np.bool_], size: tuple[int, int]) -> Tensor:
    """Scale a (H, W) mask to (width, height), with smooth edges."""
    grey = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(grey) >= 128)


def _shrunk(masks: Tensor) -> Tensor:
    """Remove the edge pixels of (N, H, W) masks; the border of the image is not an edge."""
    outside = torch.nn.functional.max_pool2d((~masks).float()[:, None], 3, stride=1, padding=1)[:, 0]
    return outside == 0


def _boxes_on(picture: LabelledImage, size: tuple[int, int], *, margin: int) -> Tensor:
    """(N, 4) int32 first and last pixel of each box on the scaled image, with a margin around it."""
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
    """Draw each text as a tag beside its box, where it covers as little of other tags and boxes as possible."""
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
    """Pillow's built-in ASCII font; for other texts a common font of the machine, if it has one."""
    if not text.isascii():
        for name in ("DejaVuSans.ttf", "NotoSans-Regular.ttf"):
            with contextlib.suppress(OSError):
                return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def _free_place(
    tag: tuple[int, int], box: Rectangle, others: Sequence[Rectangle], taken: Sequence[Rectangle], size: tuple[int, int]
) -> Rectangle:
    """Find the place where a tag of (width, height) covers least of other tags and other boxes.

    Candidates are above its box, below, beside and inside, in this order; ties: the first. Covered boxes count by the
    share of their area, because a small box is hidden by a tag that would hardly touch a large one.
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
    # Ties: the first.
    return min(((x, y, x + wide, y + high) for x, y in zip(lefts, tops, strict=True)), key=covered)


def _shared(a: Rectangle, b: Rectangle) -> int:
    """Pixels that two half-open rectangles share."""
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0, wide) * max(0, high)
