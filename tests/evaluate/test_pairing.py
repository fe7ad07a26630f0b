"""Which images and categories are the same: names first, ids only where no name speaks against them."""

import logging

import pytest

from owlsam_ray.errors import InputError
from owlsam_ray.evaluate.pairing import pair_categories, pair_images


def pair(theirs: dict[int, str], ours: dict[int, str]) -> dict[int, int]:
    sides = [{each: (name,) if name else () for each, name in side.items()} for side in (theirs, ours)]
    return pair_images(*sides, what="images of found.json", lister="truth.json").ids


@pytest.mark.parametrize(
    ("theirs", "ours", "expected"),
    [
        ({1: "b.png", 2: "a.png"}, {1: "a.png", 2: "b.png"}, {1: 2, 2: 1}),
        ({1: "val/b.png"}, {7: "b.png", 1: "c.png"}, {1: 7}),
        ({1: "b.png"}, {7: "/data/set/val/b.png"}, {1: 7}),
        ({1: "train/a.png", 2: "val/a.png"}, {5: "set/val/a.png", 6: "set/train/a.png"}, {1: 6, 2: 5}),
        ({1: "x/train/a.png", 2: "x/val/a.png"}, {5: "y/val/a.png"}, {2: 5}),
        ({1: "val\\b.png", 2: "./c.png"}, {4: "b.png", 5: "c.png"}, {1: 4, 2: 5}),
        ({1: "val2017/b.png"}, {9: "val/b.png"}, {1: 9}),  # the last part alone, which no other name has
        ({1: "cam1/0.png", 2: "cam1/1.png"}, {7: "cam1/1.png", 8: "cam2/0.png"}, {2: 7}),  # both sides have cam1
        ({1: "s/cam1/0.png", 2: "s/cam2/5.png"}, {7: "s/cam2/0.png", 8: "s/cam3/5.png"}, {}),
        ({1: "cam1/0.png", 2: "cam3/0.png"}, {7: "cam1/0.png", 8: "cam2/0.png"}, {1: 7}),  # two have it
        ({1: "train/a.png", 2: "val/a.png"}, {2: "a.png"}, {2: 2}),  # two names fit, the id tells which
        ({1: "", 2: "b.png"}, {1: "a.png", 2: ""}, {1: 1, 2: 2}),  # no name speaks against the ids
        ({1: "b.png", 2: ""}, {2: "b.png", 3: ""}, {1: 2}),  # the ids are others, as the first image shows
        ({1: "b.png", 3: "c.png"}, {2: "b.png", 3: "d.png"}, {1: 2}),
        ({4: "a.png", 3: "a.png"}, {3: "a.png"}, {3: 3}),  # a name that repeats: the same id, else the first
        ({4: "a.png", 5: "a.png"}, {3: "a.png"}, {4: 3}),
        ({1: "a.png"}, {2: "b.png"}, {}),
        ({}, {1: "a.png"}, {}),
    ],
)
def test_names_come_first(theirs: dict[int, str], ours: dict[int, str], expected: dict[int, int]) -> None:
    assert pair(theirs, ours) == expected
    if len(expected) == len(set(theirs.values())) == len(theirs):
        assert pair(ours, theirs) == {ours_id: their_id for their_id, ours_id in expected.items()}


def test_ids_that_names_contradict_are_refused_with_three_examples() -> None:
    theirs = {each: f"photo_{each}.jpg" for each in range(1, 6)}
    ours = {each: f"frame_{each}.jpg" for each in range(1, 6)}
    words = (
        r"^5 images of found.json have ids that truth.json lists under other names "
        r"\(id 1: 'photo_1.jpg' against 'frame_1.jpg'; id 2: .*; id 3: 'photo_3.jpg' against "
        r"'frame_3.jpg'\), so neither ids nor names"
    )
    with pytest.raises(InputError, match=words):
        pair(theirs, ours)
    with pytest.raises(InputError, match=r"1 images of found\.json have ids"):  # one agrees in both, one does not
        pair({1: "a.png", 2: "b.png"}, {1: "a.png", 2: "c.png"})
    with pytest.raises(InputError, match=r"id 1: 'cam3/0\.png' against 'cam2/0\.png'"):
        pair({5: "cam1/0.png", 1: "cam3/0.png"}, {1: "cam2/0.png"})


def test_names_that_fit_several_images_are_refused() -> None:
    words = r"2 names fit several images \('a.png' may be 'train/a.png' or 'val/a.png' or 1 more; 'b.png' may be"
    theirs = ["train/a.png", "val/a.png", "test/a.png", "train/b.png", "val/b.png"]
    with pytest.raises(InputError, match=words):
        pair(dict(enumerate(theirs, start=10)), {1: "a.png", 2: "b.png"})
    with pytest.raises(InputError, match=r"'a.png' may be 'train/a.png' or 'val/a.png'"):
        pair({1: "a.png"}, {7: "train/a.png", 8: "val/a.png"})


def test_other_folders_are_told(caplog: pytest.LogCaptureFixture) -> None:
    pair({1: "val/a.png", 2: "val/b.png"}, {1: "a.png", 2: "b.png"})
    assert "2 images of found.json are matched by the ends of their names" in caplog.text
    assert "other folders ('val/a.png' against 'a.png')" in caplog.text


def test_many_images_of_one_name_take_no_square_of_time() -> None:
    """Each folder holds `image.jpg`; some folders lie elsewhere."""
    theirs = {each: f"{each}/image.jpg" for each in range(20_000)}
    ours = {each + 7: f"root/{each}/image.jpg" for each in range(0, 20_000, 2)}
    assert pair(theirs, ours) == {each: each + 7 for each in range(0, 20_000, 2)}


def test_one_image_may_have_several_spellings() -> None:
    """LVIS v0.5 names COCO's images of 2014, and lies in the folders of 2017."""
    theirs = {1: ("val2017/000000000139.jpg",)}
    ours = {1: ("COCO_val2014_000000000139.jpg", "val2017/000000000139.jpg")}
    assert pair_images(theirs, ours, what="", lister="").ids == {1: 1}
    assert pair_images(ours, theirs, what="", lister="").ids == {1: 1}


def test_categories_go_by_name_and_unnamed_ones_by_id(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert pair_categories({1: "Traffic_light", 2: "dog"}, {1: "cat", 8: "traffic light"}, what="").ids == {1: 8}
    assert "are matched by name: their ids are not the ground truth's" in caplog.text
    assert pair_categories({1: "", 2: "dog"}, {1: "cat", 2: "dog"}, what="").ids == {1: 1, 2: 2}
    found = pair_categories({1: "cat", 3: "quadcopter", 9: "owl"}, {1: "cat", 3: "airplane"}, what="")
    assert (found.ids, found.contradictions) == ({1: 1}, {3: (3, "quadcopter", "airplane")})
    assert pair_categories({2: "cat", 3: "drone"}, {1: "cat", 3: "plane"}, what="").contradictions == {}
