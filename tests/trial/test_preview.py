"""`owlsam preview`: the demo's models on drawn pictures, bad pictures among them, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from owlsam_ray.cli import main as cli
from owlsam_ray.models.shipped import model_settings
from owlsam_ray.sources.drawing import CATEGORIES, Split, draw
from owlsam_ray.sources.drawn import annotation_file, image_root, write_split

NAMES = {category.id: category.name for category in CATEGORIES}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("drawn")
    write_split(directory, Split.TEST, 6, seed=5, workers=1)
    return directory


@pytest.fixture(scope="module")
def truth(drawn: Path) -> dict[str, set[str]]:
    """Names on each picture, of objects of a side of 32 pixels and more whose pair training saw."""
    tree = json.loads(annotation_file(drawn, Split.TEST).read_text())
    files = {image["id"]: image["file_name"] for image in tree["images"]}
    seen = {category.id for category in CATEGORIES if category.supercategory == "seen pair"}
    result: dict[str, set[str]] = {name: set() for name in files.values()}
    for annotation in tree["annotations"]:
        if annotation["bbox"][2] * annotation["bbox"][3] >= 32**2 and annotation["category_id"] in seen:
            result[files[annotation["image_id"]]].add(NAMES[annotation["category_id"]])
    return result


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    capsys.readouterr()
    code = cli.main(["preview", *arguments])
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    return code, json.loads(line), captured.err


def busiest(truth: dict[str, set[str]]) -> str:
    return max(truth, key=lambda name: len(truth[name]))


def test_one_picture(
    drawn: Path, truth: dict[str, set[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = busiest(truth)
    picture, out = image_root(drawn) / name, tmp_path / "out.png"
    absent = next(category.name for category in CATEGORIES if category.name not in truth[name])
    prompts = [*sorted(truth[name]), absent]
    code, summary, log = call(
        capsys, str(picture), "--demo", "--prompts", *prompts, "--min-score", "0.5", "--out", str(out)
    )
    assert code == 0, log
    found = {entry["category"]: entry for entry in summary["found"]}
    assert list(found) == prompts
    assert all(found[prompt]["boxes"] >= 1 and found[prompt]["best_score"] >= 0.5 for prompt in truth[name])
    assert found[absent] == {"category": absent, "boxes": 0, "best_score": None, "median_score": None}
    assert all(prompt in log for prompt in prompts)
    with Image.open(out) as image, Image.open(picture) as original:
        assert max(image.size) > 640  # larger than the picture itself, and a margin
        assert image.size[0] / image.size[1] == pytest.approx(original.size[0] / original.size[1], abs=0.1)


def test_a_folder_with_a_bad_picture_is_drawn_all_the_same(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "ü folder"
    folder.mkdir()
    for number, file in enumerate(sorted((image_root(drawn) / "test").iterdir())[:3]):
        (folder / f"{number}.jpg").write_bytes(file.read_bytes())
    (folder / "bad.jpg").write_bytes(b"\xff\xd8 no picture")
    Image.new("L", (1, 40)).save(folder / "hairline.png")
    arguments = (str(folder), "--demo", "--prompts", "red circle", "--out", str(tmp_path / "sheet.png"))
    code, summary, _ = call(capsys, *arguments)
    assert (code, summary["images"]) == (1, 5)
    assert list(summary["failed"].values()) == ["not_an_image"]
    assert "1 of 5 images failed" in summary["error"]
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size[0] > 4 * 480  # four columns
    (folder / "bad.jpg").unlink()
    code, summary, _ = call(capsys, *arguments, "--max-images", "2")
    assert (code, summary["images"], summary["failed"]) == (0, 2, {})


def test_the_run_files_choices_are_those_of_the_preview(
    drawn: Path, truth: dict[str, set[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Vocabulary and strategies of a run file; one name an object with `across_labels`."""
    run_file = tmp_path / "run.yaml"
    config = model_settings() | {
        "data": {
            "source": "coco",
            "images": str(image_root(drawn)),
            "annotations": str(annotation_file(drawn, Split.TEST)),
        },
        "resources": {"actors": 16, "device": "cpu"},  # a cluster's: of no interest here
    }
    run_file.write_text(yaml.safe_dump(config))
    picture = str(image_root(drawn) / busiest(truth))
    out = ("--out", str(tmp_path / "out.png"))
    code, plain, log = call(capsys, picture, "--run-file", str(run_file), *out)
    assert code == 0, log
    assert [entry["category"] for entry in plain["found"]] == [category.name for category in CATEGORIES]
    strict = ("--set", "suppress.across_labels=true", "--set", "suppress.threshold=0.5")
    code, one_name, _ = call(capsys, picture, "--run-file", str(run_file), *strict, *out)
    assert code == 0
    boxes = [sum(entry["boxes"] for entry in summary["found"]) for summary in (plain, one_name)]
    assert 0 < boxes[1] < boxes[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompts", "a cat"], "no model: detector.weights is not set"),
        (["--demo"], "nothing to look for: give --prompts"),
        (["--demo", "--prompts", "red circle", "red circle"], "names 'red circle' twice"),
        (["--demo", "--run-file", "run.yaml", "--prompts", "x"], "--demo and --run-file both choose the models"),
        (["--demo", "--prompts", "red circle", "--min-score", "0.01"], "below detector.score_floor 0.05"),
        (["--demo", "--prompts", "red circle", "--set", "suppress.sigma=0.5"], "sigma 0.5 belongs to strategy"),
        (["--demo", "--prompts", "red circle", "--set", "suppress.thresholds={blue: 0.5}"], "'blue'"),
        (["--demo", "--prompts", "word " * 40], "tokens with start and end"),
        (["--demo", "--prompts", "red circle", "--set", "supress.threshold=0.3"], "supress: Extra inputs"),
        (["--demo", "--prompts", "red circle", "--set", "reduce.min_mask_area=5"], "its threshold is --min-score"),
        (["--demo", "--prompts", "red circle", "--set", "vocabulary.templates=none"], "both choose the prompts"),
        (["--demo", "--prompts", "red circle", " "], "--prompts holds an empty text"),
        (["--demo", "--prompts", "red circle", "--min-score", "nan"], "--min-score nan is not a score"),
        (["--demo", "--prompts", "red circle", "--min-score", "2"], "--min-score 2 is not a score"),
        (["--demo", "--prompts", "red circle", "--max-images", "0"], "--max-images is 0: it must be at least 1"),
        (
            ["--demo", "--prompts", "red circle", "--out", "/proc/nothing/sheet.png"],
            "--out: cannot write to /proc/nothing",
        ),
        (["--demo", "--prompts", "red circle", "--out", "sheet.jpg"], "must be a .png file on this machine"),
        (["--demo", "--prompts", "red circle", "--out", "s3://bucket/sheet.png"], "must be a .png file"),
    ],
)
def test_bad_input(drawn: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    code, summary, _ = call(capsys, str(image_root(drawn)), *arguments)
    assert code == 2
    assert words in summary["error"]


def test_no_picture_at_all(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = ("--demo", "--prompts", "red circle", "--out", str(tmp_path / "out.png"))
    code, summary, _ = call(capsys, str(tmp_path / "nowhere.jpg"), *demo)
    assert (code, "there is no image or folder" in summary["error"]) == (2, True)
    (tmp_path / "empty.jpg").write_bytes(b"")
    code, summary, _ = call(capsys, str(tmp_path / "empty.jpg"), *demo)
    assert (code, "empty_file" in summary["error"]) == (2, True)
    assert not (tmp_path / "out.png").exists()


def test_no_picture_is_overwritten_or_labelled_twice(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.open(next((image_root(drawn) / "test").iterdir())).save(tmp_path / "photo.png")
    before = (tmp_path / "photo.png").read_bytes()
    demo = ("--demo", "--prompts", "red circle", "--out")
    code, summary, _ = call(capsys, str(tmp_path / "photo.png"), *demo, str(tmp_path / "x" / ".." / "photo.png"))
    assert (code, "would be overwritten" in summary["error"]) == (2, True)
    (tmp_path / "other.png").write_bytes(before)
    code, summary, _ = call(capsys, str(tmp_path), *demo, str(tmp_path / "other.png"))
    assert (code, "exists and is not a preview" in summary["error"]) == (2, True)
    (tmp_path / "other.png").unlink()
    for _ in range(2):  # the second time the first preview lies in the folder
        code, summary, _ = call(capsys, str(tmp_path), *demo, str(tmp_path / "preview.png"))
        assert (code, summary["images"]) == (0, 1)
    assert (tmp_path / "photo.png").read_bytes() == before


def test_masks_lie_on_the_objects(
    drawn: Path, truth: dict[str, set[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a mask is drawn, the picture is paler than it was."""
    name = busiest(truth)
    arguments = (str(image_root(drawn) / name), "--demo", "--min-score", "0.5")
    pictures = []
    for prompts in (sorted(truth[name]), [next(iter({"purple cow"}))]):
        out = tmp_path / f"{len(prompts)}.png"
        assert call(capsys, *arguments, "--prompts", *prompts, "--out", str(out))[0] == 0
        pictures.append(np.asarray(Image.open(out)).astype(int))
    changed = (np.abs(pictures[0] - pictures[1]).sum(-1) > 0).mean()
    assert 0.01 < changed < 0.8


@pytest.mark.slow
def test_tiles_find_what_the_whole_picture_is_too_small_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nine pictures as one large one: its objects have a third of the size that the detector was trained on."""
    tiles = [draw(3, Split.TEST, index) for index in range(9)]
    mosaic = np.zeros((3 * 384, 3 * 384, 3), np.uint8)
    wanted: set[str] = set()
    for index, tile in enumerate(tiles):
        height, width = tile.pixels.shape[:2]
        top, left = 384 * (index // 3), 384 * (index % 3)
        mosaic[top : top + height, left : left + width] = tile.pixels
        seen = [int(label) for label in tile.labels if CATEGORIES[label].supercategory == "seen pair"]
        wanted |= {CATEGORIES[label].name for label in seen}
    Image.fromarray(mosaic).save(tmp_path / "mosaic.png")
    demo = ("--demo", "--min-score", "0.5", "--out", str(tmp_path / "out.png"), "--set", "suppress.overlap=ios")
    arguments = (str(tmp_path / "mosaic.png"), *demo, "--prompts", *sorted(wanted))
    boxes = []
    for setting in ("tiling.size=null", "tiling.size=384"):
        code, summary, log = call(capsys, *arguments, "--set", setting)
        assert code == 0, log
        boxes.append(sum(entry["boxes"] for entry in summary["found"]))
    objects = sum(len(tile.labels) for tile in tiles)
    print(f"{objects} objects; boxes without and with tiles: {boxes}")
    assert boxes[0] < 0.6 * boxes[1]
    assert 0.7 * objects < boxes[1] < 1.5 * objects
