"""The contact sheet: what is drawn where, and that nothing else changes."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from owlsam_ray.errors import InputError
from owlsam_ray.trial import contact_sheet as pictures
from owlsam_ray.trial.contact_sheet import LabelledImage, colour_of, draw_labels, read_labelled, write_contact_sheet

GREY = (120, 120, 120)


def picture(
    boxes: list[tuple[float, float, float, float]], names: list[str], *, size_hw: tuple[int, int] = (240, 240)
) -> LabelledImage:
    """A grey picture whose masks fill the middle half of their boxes."""
    masks = np.zeros((len(boxes), *size_hw), np.bool_)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        wide, high = x1 - x0, y1 - y0
        mask[int(y0 + high / 4) : int(y1 - high / 4), int(x0 + wide / 4) : int(x1 - wide / 4)] = True
    return LabelledImage(
        pixels=np.full((*size_hw, 3), GREY, np.uint8),
        boxes_xyxy=np.array(boxes, np.float32).reshape(-1, 4),
        names=tuple(names),
        scores=np.linspace(0.9, 0.5, len(boxes), dtype=np.float32),
        masks=masks,
        caption="grey.png",
    )


def test_box_mask_and_tag_are_drawn_in_their_places_and_nothing_else_is_touched() -> None:
    image = np.asarray(draw_labels(picture([(60, 100, 180, 220)], ["red thing"])))
    assert image.shape == (480, 480, 3)  # scaled by 2
    # The line lies around the half-open box, with one pixel of another colour around itself.
    assert (image[198:200, 230:362] == (255, 0, 0)).all()
    assert (image[440:442, 118:362] == (255, 0, 0)).all()
    assert (image[442, 117:363] == 255).all()
    assert (image[200:440, 120:122] == GREY).all()
    inside = image[300, 240].astype(int)
    assert (inside > 130).all()  # half of something pale
    assert inside[0] > inside[1]  # and reddish
    assert (image[260, 190:290] == 255).all()  # the mask's outline
    assert (image[230, 140] == GREY).all()  # in the box, outside of the mask
    tag = image[179:197, 119:180].reshape(-1, 3)
    assert (tag == (255, 0, 0)).all(1).mean() > 0.5
    assert (tag == 255).all(1).sum() > 30  # letters
    changed = (image != GREY).any(-1)
    changed[179:443, 117:363] = False
    assert not changed.any()


def test_a_picture_without_labels_is_only_scaled() -> None:
    image = np.asarray(draw_labels(picture([], [], size_hw=(120, 60))))
    assert image.shape == (480, 240, 3)
    assert (image == GREY).all()


def test_a_label_without_a_mask_has_a_box_only() -> None:
    drawn = picture([(60, 100, 180, 220)], ["dog"])
    bare = LabelledImage(drawn.pixels, drawn.boxes_xyxy, drawn.names, drawn.scores, np.zeros_like(drawn.masks))
    assert (np.asarray(draw_labels(bare))[300, 240] == GREY).all()


def test_boxes_at_and_beyond_the_border_are_drawn() -> None:
    boxes = [
        (-30.0, -30.0, 30.0, 30.0),
        (200.0, 200.0, 300.0, 300.0),
        (239.5, 0.0, 240.0, 0.5),
        (250.0, 250.0, 260.0, 260.0),
    ]
    drawn = picture([(0, 0, 240, 240)] * 4, ["red", "blue", "green", "yellow"])
    odd = LabelledImage(drawn.pixels, np.array(boxes, np.float32), drawn.names, drawn.scores, drawn.masks)
    image = np.asarray(draw_labels(odd))
    assert image.shape == (480, 480, 3)
    assert (image[60:62, 5:58] == (255, 0, 0)).all()  # the line of its lower side
    assert (image[420:470, 398:400] == (0, 0, 255)).all()


def test_tags_stay_inside_and_do_not_cover_each_other() -> None:
    size, tag = (480, 480), (120, 18)
    boxes = [(0, 0, 40, 40), (10, 0, 60, 30), (440, 440, 480, 480), (430, 450, 470, 480), (200, 200, 220, 220)]
    taken: list[tuple[int, int, int, int]] = []
    for box in boxes:
        place = pictures._free_place(tag, box, [other for other in boxes if other != box], taken, size)
        assert place[2] - place[0] == 120
        assert place[3] - place[1] == 18
        assert 0 <= place[0] <= place[2] <= 480
        assert 0 <= place[1] <= place[3] <= 480
        assert all(pictures._shared(place, other) == 0 for other in taken)
        taken.append(place)
    assert taken[-1] == (200, 182, 320, 200)  # above its box, where nothing is in the way


def test_a_tag_rather_covers_nothing_than_a_small_neighbour() -> None:
    box, neighbour = (100, 100, 140, 140), (110, 84, 122, 96)
    place = pictures._free_place((80, 18), box, [neighbour], [], (480, 480))
    assert pictures._shared(place, neighbour) == 0


def test_colours_are_those_that_names_mention() -> None:
    assert colour_of("red circle") == (255, 0, 0)
    assert colour_of("Dark Cyan ring") == (0, 255, 255)
    assert colour_of("dog") == colour_of("dog") != colour_of("cat")
    assert len({colour_of(f"thing {number}") for number in range(50)}) > 40


def test_the_sheet_is_a_grid_and_the_same_each_time(tmp_path: Path) -> None:
    pictures = [picture([(60, 100, 180, 220)], ["red thing"]), picture([], []), picture([], [], size_hw=(120, 240))]
    write_contact_sheet(pictures, tmp_path / "a" / "sheet.png", columns=2)
    write_contact_sheet(pictures, tmp_path / "b.png", columns=2)
    assert (tmp_path / "a" / "sheet.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "b.png") as image:
        assert image.format == "PNG"
        sheet = np.asarray(image.convert("RGB"))
    gap, caption = 12, 22
    assert sheet.shape == (480 + 240 + 2 * caption + 3 * gap, 2 * 480 + 3 * gap, 3)
    assert (sheet[gap : gap + 480, gap : gap + 480] == np.asarray(draw_labels(pictures[0]))).all()
    assert (sheet[gap : gap + 480, 480 + 2 * gap : -gap] == GREY).all()
    assert (sheet[-gap - caption - 240 : -gap - caption, gap : gap + 480] == GREY).all()
    assert (sheet[-gap - caption : -gap, gap : gap + 100] < 128).any()  # a caption
    assert (sheet[-gap - caption - 240 :, 480 + 2 * gap :] == 255).all()  # no fourth picture


def test_no_picture_makes_no_sheet(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        write_contact_sheet([], tmp_path / "sheet.png", columns=4)
    assert list(tmp_path.iterdir()) == []


def write_coco(root: Path, count: int) -> tuple[Path, dict[str, Any]]:
    random = np.random.default_rng(11)
    tree: dict[str, Any] = {"images": [], "categories": [{"id": 3, "name": "dog"}, {"id": 7, "name": "red ball"}]}
    tree["annotations"] = []
    for index in range(count):
        name = f"{index}.png"
        Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(root / name)
        tree["images"].append({"id": 100 + index, "file_name": name, "height": 30, "width": 40})
        for category, score in ((3, 0.4), (7, 0.8), (3, 0.2)):
            mask = random.random((30, 40)) < 0.3
            rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            annotation = {"image_id": 100 + index, "category_id": category, "bbox": [1.5, 2, 10, 20], "score": score}
            if category == 7:
                annotation["segmentation"] = {"size": [30, 40], "counts": rle["counts"].decode()}
                annotation["mask"] = mask.tolist()
            tree["annotations"].append(annotation)
    file = root / "labels.json"
    file.write_text(json.dumps(tree), encoding="utf-8")
    return file, tree


def test_labels_are_read_best_first_above_the_score_and_spread_over_the_file(tmp_path: Path) -> None:
    file, tree = write_coco(tmp_path, 10)
    pictures = read_labelled(str(file), str(tmp_path), min_score=0.3, count=4)
    assert [each.caption for each in pictures] == ["0.png", "2.png", "5.png", "7.png"]
    for each in pictures:
        assert each.names == ("red ball", "dog")
        assert each.scores.tolist() == pytest.approx([0.8, 0.4])
        assert each.boxes_xyxy.tolist() == [[1.5, 2, 11.5, 22]] * 2
        index = int(each.caption.split(".")[0])
        assert (each.pixels == np.asarray(Image.open(tmp_path / each.caption))).all()
        assert (each.masks[0] == np.array(tree["annotations"][3 * index + 1]["mask"])).all()
        assert not each.masks[1].any()
    assert len(read_labelled(str(file), str(tmp_path), min_score=0.3)) == 10
    assert read_labelled(str(file), str(tmp_path), min_score=0.9, count=1)[0].masks.shape == (0, 30, 40)


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file, _ = write_coco(tmp_path, 2)
    (tmp_path / "1.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"1\.png"):
        read_labelled(str(file), str(tmp_path), min_score=0.0)
    (tmp_path / "1.png").unlink()
    with pytest.raises(InputError, match=r"1\.png"):
        read_labelled(str(file), str(tmp_path), min_score=0.0)


def test_masks_that_overlap_are_neither_black_nor_bleached_twice() -> None:
    """Two labels on one box share a mask; a third one lies across it."""
    alone = np.asarray(draw_labels(picture([(60, 100, 180, 220)], ["red thing"])))
    shared = np.asarray(draw_labels(picture([(60, 100, 180, 220)] * 2, ["red thing", "blue thing"])))
    assert (shared[300, 240] == alone[300, 240]).all()
    crossed = np.asarray(draw_labels(picture([(60, 100, 180, 220), (80, 60, 160, 230)], ["red thing", "blue thing"])))
    assert (crossed[300, 240] == alone[300, 240]).all()
    assert crossed[270:340, 210:270].min() > 100


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000])
def test_a_file_that_is_no_json_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "annotations.json"
    file.write_text(text)
    with pytest.raises(InputError, match=re.escape(f"{file} is not valid JSON")):
        read_labelled(str(file), str(tmp_path), min_score=0)
