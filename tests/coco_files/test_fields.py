"""What says yes or no in a file, whichever type a tool gave it; and what several commands make of it."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from owlsam_ray.coco_files.annotations import read_objects
from owlsam_ray.coco_files.clean import clean_file
from owlsam_ray.coco_files.fields import flag_of
from owlsam_ray.coco_files.statistics import statistics
from owlsam_ray.coco_files.statistics_run import run_statistics
from owlsam_ray.errors import InputError
from owlsam_ray.evaluate.ground_truth import load_ground_truth

CLEAR, SET = [None, False, 0, 0.0, "0", "0.0", "false", "False", " no ", ""], [True, 1, 1.0, "1", "1.0", "TRUE", "yes"]
NONE = [2, -1, 0.5, math.nan, math.inf, "maybe", "2", [], [1], {}, 10**400]


def test_one_rule_for_flags() -> None:
    assert [flag_of(value) for value in CLEAR] == [False] * len(CLEAR)
    assert [flag_of(value) for value in SET] == [True] * len(SET)
    assert [flag_of(value) for value in NONE] == [None] * len(NONE)


def tree_of(*flags: Any) -> dict[str, Any]:
    entry = {"image_id": 1, "category_id": 1, "area": 400, "segmentation": [[0, 0, 20, 0, 20, 20]]}
    return {
        "images": [{"id": 1, "file_name": "a.png", "height": 100, "width": 1000}],
        "categories": [{"id": 1, "name": "owl"}],
        "annotations": [
            entry | {"id": place, "bbox": [25 * place, 0, 20, 20], "iscrowd": flag} for place, flag in enumerate(flags)
        ],
    }


def write(path: Path, tree: dict[str, Any]) -> str:
    path.write_text(json.dumps(tree))
    return str(path)


def test_every_command_reads_flags_alike(tmp_path: Path) -> None:
    flags = [*CLEAR, *SET]
    tree = tree_of(*flags)
    url = write(tmp_path / "in.json", tree)
    expected = [False] * len(CLEAR) + [True] * len(SET)
    assert [each.is_crowd for each in load_ground_truth(url, masks=False).objects] == expected
    assert read_objects(tree, url=url, image_ids=[1], category_ids=[1]).crowd.tolist() == expected
    found = statistics(url)
    assert found["annotations"]["crowds"]["number"] == len(SET)
    assert found["problems"]["odd_crowd"]["count"] == 0
    counts = clean_file(url, str(tmp_path / "out.json"))
    written = [entry["iscrowd"] for entry in json.loads((tmp_path / "out.json").read_text())["annotations"]]
    assert written == [None, *[0] * (len(CLEAR) - 1), *[1] * len(SET)]
    assert all(type(value) is int for value in written[1:])
    assert counts["changed"]["crowd_flag"] == len(flags) - 3  # all but null, 0 and 1


@pytest.mark.parametrize("flag", ["maybe", 2, [1]])
def test_what_is_no_flag_is_told(tmp_path: Path, flag: Any) -> None:
    tree = tree_of(flag, 0)
    url = write(tmp_path / "in.json", tree)
    with pytest.raises(
        InputError, match=r"annotations\[0\] \(id 0\): iscrowd .* is neither 0 nor 1, nor true or false"
    ):
        load_ground_truth(url, masks=False)
    with pytest.raises(InputError, match="is neither 0 nor 1, nor true or false"):
        read_objects(tree, url=url, image_ids=[1], category_ids=[1])
    found = statistics(url)
    assert (found["annotations"]["crowds"]["number"], found["problems"]["odd_crowd"]["count"]) == (1, 1)
    assert f"iscrowd {flag!r}" in found["problems"]["odd_crowd"]["examples"][0]
    assert clean_file(url, str(tmp_path / "out.json"))["removed"]["malformed"] == 1


@pytest.mark.parametrize("flag", [1, "true", True])
def test_only_crowds_are_told(tmp_path: Path, flag: Any, caplog: pytest.LogCaptureFixture) -> None:
    url = write(tmp_path / "in.json", tree_of(flag, flag))
    run_statistics(url, out=None, as_json=True, console=Console(file=io.StringIO()))
    assert "all 2 objects are crowd regions" in caplog.text
    caplog.clear()
    clean_file(url, str(tmp_path / "out.json"))
    assert "all 2 objects are crowd regions" in caplog.text


@pytest.mark.parametrize(
    ("height", "width", "size", "known", "problem"),
    [
        (96.0, 128, (96, 128), 1, None),
        (0, 0, None, 0, "image_without_size"),
        (-1, -1.0, None, 0, "image_without_size"),
        (None, 0, None, 0, "image_without_size"),
        (-1, 128, None, 0, "odd_image_size"),
        (96.5, 128, None, 0, "odd_image_size"),
        (-2, 128, None, 0, "odd_image_size"),
    ],
)
def test_sizes_are_pixels_or_not_stated(
    tmp_path: Path, height: Any, width: Any, size: Any, known: int, problem: str | None
) -> None:
    tree = tree_of(0)
    tree["images"][0] |= {"height": height, "width": width}
    url = write(tmp_path / "in.json", tree)
    assert load_ground_truth(url, masks=False).images[1].size_hw == size
    found = statistics(url)
    assert found["images"]["sizes"]["known"] == known
    for name in ("image_without_size", "odd_image_size"):
        assert found["problems"][name]["count"] == (name == problem)
    if height in (96.5, -2):
        with pytest.raises(InputError, match=r"height (96\.5|-2) is not a whole number of pixels"):
            clean_file(url, str(tmp_path / "out.json"))
    else:
        clean_file(url, str(tmp_path / "out.json"))
        written = json.loads((tmp_path / "out.json").read_text())["images"][0]
        assert (written["height"], written["width"]) == (height, width)  # as the file states them


def test_a_size_that_is_no_number_is_not_stated(tmp_path: Path) -> None:
    tree = tree_of(0)
    tree["images"][0] |= {"height": math.nan, "width": math.nan}
    url = write(tmp_path / "in.json", tree)
    assert load_ground_truth(url, masks=False).images[1].size_hw is None
