"""Read a COCO dataset for training: cleaned objects, decoded images.

Shapes: N objects of one image, H W original pixels. Boxes are half-open.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from owlsam_ray import storage
from owlsam_ray.coco_files.annotations import read_objects
from owlsam_ray.coco_files.cleaning import CleaningReport, CleaningSettings, clean
from owlsam_ray.coco_files.outlines import Outline
from owlsam_ray.config.base import MEGABYTE
from owlsam_ray.config.inference import DecodeConfig
from owlsam_ray.config.vocabulary import Category, VocabularyConfig
from owlsam_ray.errors import ImageError, InputError
from owlsam_ray.fetch.images import fetch_file
from owlsam_ray.inference.decode import decode_image
from owlsam_ray.ops.masks import decode_rle
from owlsam_ray.sources.coco import list_tree, read_tree
from owlsam_ray.sources.listing import ImageRecord
from owlsam_ray.vocabulary import resolve_vocabulary

GRID = 256
"""Box coordinates are multiples of 1 / GRID px: float32 is exact up to 65,536 px, and W - (W - x) is x."""

_LIMITS = DecodeConfig()


@dataclass(frozen=True, slots=True)
class Sample:
    """One image and its objects."""

    image_id: int
    pixels: NDArray[np.uint8]
    """(H, W, 3) RGB, contiguous."""
    boxes_xyxy: NDArray[np.float32]
    """(N, 4) original pixels, each with a nonzero area."""
    labels: NDArray[np.int64]
    """(N,) index into the categories."""
    masks: NDArray[np.bool_] | None
    """(N, H, W), none of them empty; None when not requested."""


@dataclass(frozen=True, slots=True)
class TrainingImages:
    """M images and the objects left after cleaning. Only `load` opens images. Thread-safe."""

    categories: tuple[Category, ...]
    """Categories in the file's order; `labels` are indices into them."""
    report: CleaningReport
    image_ids: tuple[int, ...]
    """M ids in the file's order."""
    _root: str
    _records: tuple[ImageRecord, ...]
    _offsets: NDArray[np.int64]
    """(M + 1,): objects of image i are at _offsets[i] : _offsets[i + 1]."""
    _boxes_xyxy: NDArray[np.float32]
    _labels: NDArray[np.int64]
    _outlines: Sequence[Outline | None] | None
    """None if they were not kept: a detector does not need them, and they are most of the memory."""
    _clip_boxes: bool
    _max_pixels: int

    def __len__(self) -> int:
        return len(self._records)

    def load(self, index: int, *, masks: bool = False) -> Sample:
        """Read one image.

        Args:
            index: 0 … M - 1.
            masks: whether to draw masks.

        Returns:
            The objects by ascending annotation id; N may be 0. With `masks`, objects without a segmentation and those
            whose mask has no pixel (slivers) are left out.

        Raises:
            ImageError: the file is missing or cannot be decoded (the reasons of `fetch_file` and `decode_image`), its
                size differs from the one that the annotation file states (`stated_size_differs`: its boxes would be
                wrong), or an RLE is damaged (`bad_mask`).
        """
        record = self._records[index]
        stated = (record.height, record.width) if record.height is not None and record.width is not None else None
        uri = storage.join(self._root, record.file_name)
        data = fetch_file(uri, max_bytes=_LIMITS.max_file_mb * MEGABYTE)
        picture = decode_image(data, stated_hw=stated, max_pixels=self._max_pixels)
        if picture.size_differs:
            raise ImageError(str(picture.note))
        height, width = picture.pixels.shape[:2]
        mine = slice(int(self._offsets[index]), int(self._offsets[index + 1]))
        boxes, labels = self._boxes_xyxy[mine], self._labels[mine]
        keep = np.ones(len(boxes), np.bool_)
        if stated is None and len(boxes):  # the right and bottom borders were unknown until now
            inside = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
            keep[:] = (inside[:, 2:] > inside[:, :2]).all(axis=1)
            boxes = inside if self._clip_boxes else boxes
        drawn = None
        if masks:
            if self._outlines is None:
                raise ValueError("these images were read without outlines: there are no masks to draw")
            drawn = _draw(self._outlines[mine], (height, width))
            keep[[not mask.any() for mask in drawn]] = False
            drawn = drawn[keep]
        return Sample(self.image_ids[index], picture.pixels, boxes[keep], labels[keep], drawn)


def read_training_images(
    annotations: str,
    images: str,
    cleaning: CleaningSettings,
    *,
    masks: bool = True,
    max_pixels: int = _LIMITS.max_pixels,
) -> TrainingImages:
    """Read a COCO file and clean its annotations; no image is opened.

    Args:
        annotations: the COCO file: a path or an fsspec URL.
        images: root of its file names: a directory or an fsspec URL.
        cleaning: which annotations are trained on.
        masks: keep the outlines, so that `load` can draw masks.
        max_pixels: larger images fail in `load`.

    Raises:
        InputError: the file cannot be read or contradicts itself (see `list_tree` and `read_objects`), it has no
            categories or repeats one, none of the looked-up images exists, or cleaning leaves no annotation.
    """
    tree = read_tree(annotations)
    listed = list_tree(tree, url=annotations, root=images)
    categories = _categories(listed.categories, annotations)
    ids = listed.image_ids
    objects = read_objects(tree, url=annotations, image_ids=ids, category_ids=[category.id for category in categories])
    sizes = np.array([(record.height or np.inf, record.width or np.inf) for record in listed.records], np.float64)
    cleaned = clean(objects, image_ids=ids, sizes_hw=sizes, settings=cleaning)
    if len(cleaned.kept) == 0:
        raise InputError(
            f"{annotations} has no annotation to train on: {cleaned.report.summary()}. Fix the file, or relax the "
            "cleaning settings."
        )
    of_images = np.bincount(objects.image_index[cleaned.kept], minlength=len(ids))[cleaned.images]
    return TrainingImages(
        categories=categories,
        report=cleaned.report,
        image_ids=tuple(ids[index] for index in cleaned.images.tolist()),
        _root=images,
        _records=tuple(listed.records[index] for index in cleaned.images.tolist()),
        _offsets=np.concatenate([[0], np.cumsum(of_images)]).astype(np.int64),
        _boxes_xyxy=_on_grid(cleaned.boxes_xyxy),
        _labels=objects.labels[cleaned.kept],
        _outlines=cleaned.outlines if masks else None,
        _clip_boxes=cleaning.clip_boxes,
        _max_pixels=max_pixels,
    )


def _categories(entries: list[dict[str, Any]], url: str) -> tuple[Category, ...]:
    if not entries:
        raise InputError(f"{url} lists no categories: training needs a COCO file with a non-empty `categories`")
    try:
        return resolve_vocabulary(VocabularyConfig(categories="dataset"), entries).categories
    except InputError as error:
        raise InputError(f"{url}: {error}") from None


def _on_grid(boxes_xyxy: NDArray[np.float64]) -> NDArray[np.float32]:
    """(N, 4) boxes expanded to multiples of 1 / GRID, so that none loses its area."""
    low, high = np.floor(boxes_xyxy[:, :2] * GRID), np.ceil(boxes_xyxy[:, 2:] * GRID)
    return (np.concatenate([low, high], axis=1) / GRID).astype(np.float32)


def _draw(outlines: Sequence[Outline | None], size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """(N, H, W) masks; empty ones for objects without an outline."""
    masks = np.zeros((len(outlines), *size_hw), np.bool_)
    for mask, outline in zip(masks, outlines, strict=True):
        if outline is None:
            continue
        try:
            mask[:] = decode_rle(outline if isinstance(outline, bytes) else _fill(outline, size_hw), size_hw)
        except ValueError as error:
            raise ImageError(f"bad_mask: {error}") from None
    return masks


def _fill(polygons: Sequence[NDArray[np.float64]], size_hw: tuple[int, int]) -> bytes:
    """RLE counts of the union of all polygons, as drawn by pycocotools' `annToMask`."""
    parts = coco_mask.frPyObjects([polygon.tolist() for polygon in polygons], *size_hw)
    return bytes(coco_mask.merge(parts)["counts"])
