"""The drawn dataset: the same everywhere, exact masks, and pairs that training never sees."""

import colorsys
import errno
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools.coco import COCO

from owlsam_ray.errors import GuardError
from owlsam_ray.ops.boxes import pair_overlaps
from owlsam_ray.ops.masks import tight_box
from owlsam_ray.sources import drawing
from owlsam_ray.sources import drawn as dataset
from owlsam_ray.sources.drawing import (
    CATEGORIES,
    COLOURS,
    MAX_OBJECTS,
    MIN_SIDE,
    PLAIN,
    SEEN,
    SHAPES,
    UNKNOWN_SHAPE,
    WITHHELD_PAIR,
    Crowd,
    Drawing,
    Split,
    draw,
)
from owlsam_ray.sources.drawn import annotation_file, image_root, write_split
from tests.crowded import CROWDED

SEED = 5
GROUPS = np.array([category.supercategory for category in CATEGORIES])


@pytest.fixture(scope="module")
def drawings() -> list[Drawing]:
    return [draw(SEED, Split.TEST, index) for index in range(40)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("drawn")
    write_split(directory, Split.TEST, 40, seed=SEED, workers=1)
    return directory


def digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_two_processes_write_the_same_bytes_as_one(written: Path, tmp_path: Path) -> None:
    write_split(tmp_path, Split.TEST, 40, seed=SEED, workers=2)
    assert len(digests(written)) == 41
    assert digests(tmp_path) == digests(written)


def test_a_picture_depends_on_its_seed_split_and_index_only(drawings: list[Drawing]) -> None:
    again = draw(SEED, Split.TEST, 7)
    assert (again.pixels == drawings[7].pixels).all()
    assert (again.masks == drawings[7].masks).all()
    assert (again.labels == drawings[7].labels).all()
    others = [draw(SEED, Split.TRAIN, 7), draw(SEED, Split.VAL, 7), draw(SEED + 1, Split.TEST, 7), drawings[8], again]
    for index, one in enumerate(others):
        for other in others[:index]:
            assert one.pixels.shape != other.pixels.shape or (one.pixels != other.pixels).mean() > 0.5


def test_the_pictures_of_the_demo_are_those_that_its_numbers_were_measured_on() -> None:
    names = [[CATEGORIES[label].name for label in draw(1, Split.TEST, index).labels] for index in range(2)]
    assert names == [
        ["cyan triangle", "blue square", "magenta star", "magenta heart", "red circle"],
        ["yellow circle", "cyan square", "magenta circle", "magenta ring", "blue star", "red square", "red square",
         "blue circle", "magenta circle"],
    ]  # fmt: skip


def test_the_pictures_that_the_checkpoints_learned_from_stay_as_they_are() -> None:
    """What every random number of a picture leads to, but for the last bits of a processor's sines."""
    assert Crowd((1, 12), max_box_iou=0.5, min_visible=0.6, companions=0.0, withheld=0.25, tries=4) == PLAIN
    digest = hashlib.sha256()
    for split in Split:
        for index in range(30):
            each = draw(SEED, split, index)
            digest.update(
                json.dumps([each.pixels.shape, each.labels.tolist(), [tight_box(m) for m in each.masks]]).encode()
            )
    assert digest.hexdigest()[:16] == "19f6e428a458453f"
    corner = draw(SEED, Split.TRAIN, 0).pixels[-2:, -2:].reshape(-1).astype(int)  # noise is drawn last
    assert corner == pytest.approx([109, 101, 110, 110, 99, 105, 110, 101, 106, 107, 100, 111], abs=1)


@pytest.fixture(scope="module")
def crowded() -> list[Drawing]:
    return [draw(SEED, Split.TEST, index, crowd=CROWDED) for index in range(40)]


def test_crowded_pictures_hold_12_to_24_objects_of_seen_pairs(crowded: list[Drawing]) -> None:
    counts = [len(each.labels) for each in crowded]
    assert min(counts) >= 12
    assert max(counts) <= 24
    assert len(set(counts)) > 8
    assert set(GROUPS[np.concatenate([each.labels for each in crowded])]) == {SEEN}
    assert max(each.masks.sum(0).max() for each in crowded) == 1
    again = draw(SEED, Split.TEST, 7, crowd=CROWDED)
    assert (again.pixels == crowded[7].pixels).all()


def test_crowded_pictures_have_strong_overlaps_of_one_label_within_their_limits(
    monkeypatch: pytest.MonkeyPatch, crowded: list[Drawing]
) -> None:
    whole: list[NDArray[np.bool_]] = []
    real = drawing._place

    def recorded(*arguments: Any, **options: Any) -> Any:
        placed = real(*arguments, **options)
        if placed is not None:
            top, left, coverage, _ = placed
            full = np.zeros(arguments[2].shape, np.bool_)
            full[top : top + len(coverage), left : left + coverage.shape[1]] = coverage >= 0.5
            whole.append(full)
        return placed

    monkeypatch.setattr(drawing, "_place", recorded)
    close, repeats = [], []
    for index, before in enumerate(crowded[:20]):
        whole.clear()
        each = draw(SEED, Split.TEST, index, crowd=CROWDED)
        assert (each.masks == before.masks).all()
        for full, visible in zip(whole, each.masks, strict=True):
            assert not (visible & ~full).any()
            assert visible.sum() >= CROWDED.min_visible * full.sum()
        overlaps = box_overlaps(whole)
        assert overlaps.max() <= CROWDED.max_box_iou
        same = each.labels[:, None] == each.labels[None]
        close += (box_overlaps(list(each.masks)) * same).max(1).tolist()
        repeats += (each.labels[1:] == each.labels[:-1]).tolist()
    assert CROWDED.min_visible == 0.35
    assert CROWDED.max_box_iou == 0.8
    assert 0.4 < np.mean(repeats) < 0.6
    assert np.mean(np.array(close) > 0.5) > 0.3


def box_overlaps(masks: list[NDArray[np.bool_]]) -> NDArray[np.float64]:
    """(N, N) IoU of the tight boxes; 0 with itself."""
    boxes = np.array([tight_box(mask) for mask in masks], np.float32)
    overlaps = pair_overlaps(boxes[:, None], boxes[None], "iou")
    np.fill_diagonal(overlaps, 0)
    return overlaps


def test_masks_are_disjoint_and_sizes_in_range(drawings: list[Drawing]) -> None:
    for each in drawings:
        height, width = each.pixels.shape[:2]
        assert each.pixels.shape == (height, width, 3)
        assert 256 <= min(height, width) <= max(height, width) <= 384
        assert len(each.masks) == len(each.labels) <= MAX_OBJECTS
        assert each.masks.any((1, 2)).all()
        assert each.masks.sum(0).max(initial=0) <= 1
    counts = {len(each.labels) for each in drawings}
    assert min(counts) <= 2
    assert max(counts) >= 9
    assert len({each.pixels.shape for each in drawings}) > 30


def test_objects_are_12_px_to_half_the_image_and_at_least_60_percent_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    whole: list[NDArray[np.bool_]] = []
    real = drawing._place

    def recorded(*arguments: Any, **options: Any) -> Any:
        placed = real(*arguments, **options)
        if placed is not None:
            whole.append(placed[2] >= 0.5)
        return placed

    monkeypatch.setattr(drawing, "_place", recorded)
    sides: list[float] = []
    shares: list[float] = []
    for index in range(40):
        whole.clear()
        each = draw(SEED, Split.TRAIN, index)
        assert len(whole) == len(each.labels)
        for full, visible in zip(whole, each.masks, strict=True):
            x0, y0, x1, y1 = tight_box(full)
            assert min(x1 - x0, y1 - y0) >= MIN_SIDE == 12
            assert max(x1 - x0, y1 - y0) <= min(visible.shape) / 2 + 1
            sides.append(np.sqrt((x1 - x0) * (y1 - y0)))
            shares.append(visible.sum() / full.sum())
    assert min(shares) >= 0.6
    assert sum(share < 1 for share in shares) > 5  # objects do cover each other
    assert sum(side < 32 for side in sides) > 0.2 * len(sides)
    assert sum(side >= 96 for side in sides) > 0.1 * len(sides)


def test_objects_have_the_colour_of_their_name(drawings: list[Drawing]) -> None:
    for each in drawings:
        for mask, label in zip(each.masks, each.labels, strict=True):
            red, green, blue = np.median(each.pixels[mask], axis=0) / 255
            hue = colorsys.rgb_to_hsv(red, green, blue)[0]
            named = COLOURS[CATEGORIES[label].name.split()[0]]
            assert min(abs(hue - named), 1 - abs(hue - named)) < 0.06


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_fill_their_box_as_geometry_says(name: str) -> None:
    # Area of each shape over the area of [-1, 1]², worked out by hand.
    expected = {
        "circle": np.pi / 4,
        "square": 0.88**2,
        "triangle": 0.5 * 2 * (0.85 + 1) / 1.85 * (0.85 + 1) / 4,
        "star": 5 * 0.46 * np.sin(np.pi / 5) / 4,
        "ring": 0.7 * np.pi / 4,
        "cross": (2 * 2 * 0.64 - 0.64**2) / 4,
        "heart": 0.66,  # no simple formula: the figure of a fine grid, only against blunders
    }[name]
    v, u = np.meshgrid(*[np.linspace(-1, 1, 801, dtype=np.float32)] * 2, indexing="ij")
    assert SHAPES[name](u, v).mean() == pytest.approx(expected, abs=0.01)


def test_30_pairs_are_seen_and_12_are_withheld() -> None:
    assert [category.id for category in CATEGORIES] == list(range(1, 43))
    assert len({category.name for category in CATEGORIES}) == 42
    assert [np.count_nonzero(group == GROUPS) for group in (SEEN, WITHHELD_PAIR, UNKNOWN_SHAPE)] == [30, 6, 6]
    withheld = [category.name for category in CATEGORIES if category.supercategory == WITHHELD_PAIR]
    # Each colour and each shape is seen in other pairs: only the combination is new.
    assert {name.split()[0] for name in withheld} == set(COLOURS)
    assert {name.split()[1] for name in withheld} == set(SHAPES) - {"heart"}


def test_withheld_pairs_are_in_a_quarter_of_the_test_pictures_and_nowhere_else(drawings: list[Drawing]) -> None:
    for split in (Split.TRAIN, Split.VAL):
        labels = np.concatenate([draw(SEED, split, index).labels for index in range(40)])
        assert set(GROUPS[labels]) == {SEEN}
        assert len(set(labels.tolist())) >= 28
    mixed = [each for each in drawings if (GROUPS[each.labels] != SEEN).any()]
    assert 4 <= len(mixed) <= 16
    assert {*GROUPS[np.concatenate([each.labels for each in mixed])]} == {SEEN, WITHHELD_PAIR, UNKNOWN_SHAPE}


def test_the_coco_file_says_what_was_drawn(written: Path, drawings: list[Drawing]) -> None:
    coco = COCO(str(annotation_file(written, Split.TEST)))
    assert coco.getCatIds() == [category.id for category in CATEGORIES]
    assert sorted(coco.getAnnIds()) == list(range(1, sum(len(each.labels) for each in drawings) + 1))
    for index, each in enumerate(drawings):
        image = coco.loadImgs(index + 1)[0]
        pixels = np.asarray(Image.open(image_root(written) / image["file_name"]), np.int16)
        assert pixels.shape == each.pixels.shape == (image["height"], image["width"], 3)
        assert np.abs(pixels - each.pixels).mean() < 6  # JPEG
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=index + 1))
        assert [annotation["category_id"] for annotation in annotations] == [label + 1 for label in each.labels]
        for annotation, mask in zip(annotations, each.masks, strict=True):
            assert (coco.annToMask(annotation) == mask).all()
            x0, y0, x1, y1 = tight_box(mask)
            assert annotation["bbox"] == [x0, y0, x1 - x0, y1 - y0]
            assert annotation["area"] == mask.sum()
            assert annotation["iscrowd"] == 0


@pytest.mark.parametrize("split", [Split.TRAIN, Split.VAL])
def test_training_files_do_not_name_what_is_withheld(split: Split, tmp_path: Path) -> None:
    tree = json.loads(write_split(tmp_path, split, 3, seed=SEED, workers=1).read_text())
    assert {category["supercategory"] for category in tree["categories"]} == {SEEN}
    assert len(tree["categories"]) == 30
    assert {annotation["category_id"] for annotation in tree["annotations"]} <= {
        category["id"] for category in tree["categories"]
    }


def times(directory: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


def test_a_finished_split_is_left_as_it_is(tmp_path: Path) -> None:
    file = write_split(tmp_path, Split.VAL, 3, seed=SEED, workers=1)
    before = times(tmp_path)
    assert len(before) == 4
    assert write_split(tmp_path, Split.VAL, 3, seed=SEED, workers=1) == file
    assert times(tmp_path) == before
    picture = image_root(tmp_path) / "val" / "000000.jpg"
    picture.unlink()
    assert write_split(tmp_path, Split.VAL, 3, seed=SEED, workers=1) == file
    assert not picture.exists()


@pytest.mark.parametrize(("count", "seed"), [(2, SEED), (4, SEED), (3, SEED + 1)])
def test_a_finished_split_of_other_pictures_is_refused(tmp_path: Path, count: int, seed: int) -> None:
    file = write_split(tmp_path, Split.VAL, 3, seed=SEED, workers=1)
    before, bytes_before = times(tmp_path), digests(tmp_path)
    with pytest.raises(GuardError, match=rf"lists 3 drawn pictures of seed {SEED}, not {count} of seed {seed}: choose"):
        write_split(tmp_path, Split.VAL, count, seed=seed, workers=1)
    assert (times(tmp_path), digests(tmp_path)) == (before, bytes_before)
    file.unlink()  # the way out
    write_split(tmp_path, Split.VAL, count, seed=seed, workers=1)
    assert len(json.loads(file.read_text())["images"]) == count


@pytest.mark.parametrize("content", ["{", "[]", '{"images": []}'])
def test_a_damaged_file_of_a_split_is_refused(tmp_path: Path, content: str) -> None:
    annotation_file(tmp_path, Split.VAL).write_text(content)
    with pytest.raises(
        GuardError, match=r"val\.json is not a file of drawn pictures: choose another directory, or del"
    ):
        write_split(tmp_path, Split.VAL, 3, seed=SEED, workers=1)


def test_pictures_that_are_there_are_not_written_again(tmp_path: Path) -> None:
    # What a second training meets that started to draw at the same time.
    file = write_split(tmp_path, Split.VAL, 3, seed=SEED, workers=1)
    before = digests(tmp_path)
    file.unlink()
    damaged = image_root(tmp_path) / "val" / "000001.jpg"
    damaged.write_bytes(damaged.read_bytes()[:100])
    written = times(tmp_path)
    write_split(tmp_path, Split.VAL, 3, seed=SEED, workers=1)
    assert digests(tmp_path) == before
    changed = {path for path, time in times(tmp_path).items() if written.get(path) != time}
    assert changed == {str(damaged), str(file)}


def test_a_split_that_another_process_finished_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_split(tmp_path / "other", Split.VAL, 3, seed=SEED, workers=1)
    file = annotation_file(tmp_path, Split.VAL)

    def draw_late(seed: int, split: Split, index: int) -> Drawing:
        if index == 2:
            annotation_file(tmp_path / "other", Split.VAL).rename(file)
        return draw(seed, split, index)

    monkeypatch.setattr(dataset, "draw", draw_late)
    inode = annotation_file(tmp_path / "other", Split.VAL).stat().st_ino
    assert write_split(tmp_path, Split.VAL, 3, seed=SEED, workers=1) == file
    assert file.stat().st_ino == inode


def test_a_full_disk_leaves_no_half_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        real(self, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_split(tmp_path, Split.VAL, 1, seed=SEED, workers=1)
    assert digests(tmp_path) == {}
