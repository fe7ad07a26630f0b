"""The `owlsam` command as a user or a scheduler meets it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools.coco import COCO

from owlsam_ray.cli import main as cli
from owlsam_ray.cli.options import all_overrides
from owlsam_ray.cli.parser import make_parser
from owlsam_ray.config.load import load_tree
from owlsam_ray.run.shards import done_shards, shard_url
from tests.drawn_images import draw_image
from tests.runs import ROOT, TinyRun, environment


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Run a command in this process: exit code, summary, log."""
    capsys.readouterr()
    code = cli.main(arguments)
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()  # one line and no more
    summary = json.loads(line)
    assert summary["exit_code"] == code
    return code, summary, captured.err


@pytest.mark.parametrize("command", [[], ["plan"], ["annotate"], ["reduce"]])
def test_help_has_examples_and_exit_codes(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "75  interrupted" in text
    if command:
        assert f"owlsam {command[0]} run.yaml --run runs/coco" in text


def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["label"], ["plan"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
    assert call(capsys, "plan", "nowhere.yaml")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["stats", "x.json", "--out", ""], "--out"),
        (["calibrate", "x.yaml", "--ground-truth", " "], "--ground-truth"),
        (["reduce", "x.yaml", "--operating-points", ""], "--operating-points"),
        (["plan", "x.yaml", "--run", ""], "--run"),
    ],
)
def test_an_option_with_an_empty_value_is_refused(
    arguments: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, summary, _ = call(capsys, *arguments)
    assert code == 2
    assert summary["error"].startswith(f"{option} has an empty value (an unset shell variable?)")


def test_paths_given_as_options_reach_the_settings_as_they_are() -> None:
    for name in ("labels #2", "😀: x", "*", "a\tb"):
        options = make_parser().parse_args(["reduce", "x.yaml", "--out", name])
        assert load_tree([], all_overrides(options)) == {"reduce": {"out": name}}


def test_a_finished_run_says_so_and_does_nothing(
    tiny: TinyRun, uninterrupted: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny.root / "uninterrupted"
    before = {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(run / "predictions")}
    code, summary, log = call(capsys, "annotate", str(tiny.run_file), "--run", str(run))
    assert (code, summary["new"], summary["done"], summary["left"]) == (0, 0, 320, 0)
    assert "nothing to do: all 40 shards" in log
    assert {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(run / "predictions")} == before


def test_other_settings_are_refused_by_name(
    tiny: TinyRun, uninterrupted: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tiny.root / "uninterrupted")
    for command in ("plan", "annotate", "reduce"):
        code, summary, log = call(
            capsys, command, str(tiny.run_file), "--run", run, "--set", "detector.score_floor=0.4"
        )
        assert code == 3
        assert "detector.score_floor: 0.3 -> 0.4" in log
        assert "detector.score_floor: 0.3 -> 0.4" in summary["error"]


@pytest.mark.slow
def test_progress_file(undisturbed_on_ray: Path) -> None:
    state = json.loads((undisturbed_on_ray / "progress.json").read_text())
    assert (state["images"], state["done"], state["left"], state["failed"], state["eta_s"]) == (320, 320, 0, 0, 0)
    assert state["images_per_s"] > 0
    assert set(state["stage_s"]) == {"decode", "detect", "suppress", "segment", "encode"}


def test_plan_twice_and_reduce_too_early(tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (str(tiny.run_file), "--run", str(tmp_path / "run"))
    assert call(capsys, "reduce", *arguments)[0] == 2
    code, summary, _ = call(capsys, "plan", *arguments)
    assert (code, summary["planned"], summary["images"], summary["shards"]) == (0, True, 320, 40)
    code, summary, log = call(capsys, "plan", *arguments, "--set", "resources.shard_size=50")
    assert (code, summary["planned"], summary["shards"]) == (0, False, 40)
    assert "already planned" in log
    code, _, log = call(capsys, "reduce", *arguments)
    assert code == 5
    assert "nothing was labelled" in log


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("vocabulary.categories=[]", "vocabulary.categories is empty"),
        ("vocabulary.categories=[cat, cat]", "given more than once: 'cat'"),
        (
            "vocabulary.templates='{} with a description that goes on for much too long'",
            "the text encoder takes at most 48",
        ),
        ("data.images=/nowhere", "none of 20 images looked up exists"),
        ("detector.weights=/nowhere", "is not a directory in Hugging Face layout"),
        ("segment.weights=/nowhere", "there are no segmenter weights"),
        (
            "segment={model: sam, weights: /nowhere}",
            "segment.weights /nowhere is not a directory in Hugging Face layout",
        ),
        ("detector.model=owlv2", "holds an owlvit model, and detector.model is owlv2"),
        ("detector.image_size=100", "detector.image_size 100 is not a multiple of the patch size 16"),
        ("suppress.thresholds={dog: 0.5}", "suppress.thresholds names unknown categories: 'dog'"),
        ("vocabulary.exemplars=[{category: cat, image: /nowhere.jpg}]", "/nowhere.jpg of 'cat' does not exist"),
        ("vocabulary.exemplars=[{category: dog, image: /nowhere.jpg}]", "vocabulary.exemplars[0] shows 'dog'"),
        ("run=/proc/nothing", "cannot write to the run directory"),
    ],
)
def test_bad_input_is_told_before_anything_runs(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, words: str
) -> None:
    run = [] if setting.startswith("run=") else ["--run", str(tmp_path / "run")]
    code, summary, log = call(capsys, "annotate", str(tiny.run_file), *run, "--set", setting)
    assert code == 2
    assert words in log
    assert words in summary["error"]
    assert not (tmp_path / "run" / "predictions").exists()
    if run:  # what is fixed is not refused as another setting
        assert call(capsys, "plan", str(tiny.run_file), *run)[0] == 0


def hostile_dataset(root: Path) -> int:
    """Every kind of image that the brief names, and good ones among them; returns how many must fail."""
    root.mkdir()
    good = draw_image(1)
    good.save(root / "good ü 猫.jpg")
    draw_image(2).save(root / "good.png")
    data = (root / "good ü 猫.jpg").read_bytes()
    (root / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (root / "empty.jpg").write_bytes(b"")
    (root / "page.jpg").write_bytes(b"<html>not found</html>")
    (root / "gone.jpg").symlink_to(root / "nowhere.jpg")
    good.convert("CMYK").save(root / "cmyk.jpg")
    good.convert("L").save(root / "grey.jpg")
    good.quantize(8).save(root / "palette.png", transparency=1)
    Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80) * 13).save(root / "wide.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    good.save(root / "rotated.jpg", exif=exif)
    good.save(root / "animated.gif", save_all=True, append_images=[draw_image(3).resize(good.size)])
    Image.new("RGB", (1, 1), "red").save(root / "pixel.png")
    Image.new("1", (12_000, 9_000)).save(root / "huge.png")
    return 4


@pytest.mark.slow
def test_bad_images_become_rows(tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """End to end in a process of its own, on a machine with one CPU."""
    failing = hostile_dataset(tmp_path / "images")
    settings: dict[str, Any] = {
        "data.source": "folder",
        "data.images": str(tmp_path / "images"),
        "data.annotations": None,
        "resources.num_cpus": 1,
    }
    run = tmp_path / "run"
    summary = tiny.call("annotate", run, check=1, **settings)
    assert (summary["images"], summary["done"], summary["failed"]) == (14, 14, failing)
    assert "4 of 14 images failed" in summary["error"]
    same = [f"--set={name}={json.dumps(value)}" for name, value in settings.items()]
    code, counts, _ = call(capsys, "reduce", str(tiny.run_file), "--run", str(run), *same)
    assert (code, counts["failed"]) == (1, failing)
    code, summary, _ = call(capsys, "reduce", str(tiny.run_file), "--run", str(run), *same, "--set=reduce.max_failed=4")
    assert code == 0
    assert summary["failed_by_reason"] == {"empty_file": 1, "missing": 1, "not_an_image": 1, "truncated": 1}
    coco = COCO(str(run / "coco" / "annotations.json"))
    assert len(coco.getImgIds()) == 10
    sizes = {image["file_name"]: (image["height"], image["width"]) for image in coco.dataset["images"]}
    upright = draw_image(1)
    assert sizes["rotated.jpg"] == (upright.width, upright.height)
    assert sizes["huge.png"] == (9000, 12_000)
    assert sizes["pixel.png"] == (1, 1)
    assert sizes["good ü 猫.jpg"] == (upright.height, upright.width)
    for annotation in coco.dataset["annotations"]:
        image = coco.imgs[annotation["image_id"]]
        assert annotation["segmentation"]["size"] == [image["height"], image["width"]]
    failures = [json.loads(line) for line in (run / "coco" / "failures.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {failure["file_name"] for failure in failures} == {"truncated.jpg", "empty.jpg", "page.jpg", "gone.jpg"}


@pytest.mark.slow
def test_what_cannot_start_says_so(tiny: TinyRun, tmp_path: Path) -> None:
    settings = {"resources.num_cpus": 2, "resources.actors": 2, "resources.cpus_per_actor": 1}
    summary = tiny.call("annotate", tmp_path / "run", check=2, **settings)
    assert "2 actor(s) × 1 CPU + fetch 0.5 + write 0.25 = 2.75 CPUs, but Ray has 2" in summary["error"]
    assert summary["wall_s"] < 60


def test_a_cluster_that_does_not_answer_is_told_in_seconds(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = "resources.ray_address=127.0.0.1:1"
    code, summary, log = call(capsys, "annotate", str(tiny.run_file), "--run", str(tmp_path), "--set", address)
    assert code == 5
    assert "no cluster answers at resources.ray_address 127.0.0.1:1" in log
    assert summary["wall_s"] < 60


def test_a_corrupt_shard_is_named(
    tiny: TinyRun, uninterrupted: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """That its images are labelled anew once it is gone: see `test_pipeline`."""
    run = tmp_path / "run"
    shutil.copytree(tiny.root / "uninterrupted", run)
    shard = run / "predictions" / "shard-00000006.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    for command in ("annotate", "reduce"):
        code, _, log = call(capsys, command, str(tiny.run_file), "--run", str(run))
        assert code == 5
        assert f"{shard} is not a whole shard of this run" in log
        assert "Delete or move this file and run `owlsam annotate` again" in log


@pytest.mark.slow
def test_a_full_disk_keeps_what_is_done(
    tiny: TinyRun, uninterrupted: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a real file system of 250 kB; needs the right to mount one."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=250k", "tmpfs", str(small)]
    try:
        refused = subprocess.run(mount, capture_output=True, text=True, check=False).stderr
    except FileNotFoundError:
        refused = "there is no `mount`"
    if refused:
        pytest.skip(f"cannot mount a small file system: {refused}")
    try:
        run = small / "run"
        assert "No space left on device" in tiny.call("annotate", run, check=5)["error"]
        done = done_shards(str(run))
        assert 0 < len(done) < 40
        for shard in done:
            one, other = (pq.read_table(shard_url(str(root), shard)) for root in (run, tiny.root / "uninterrupted"))
            assert one.equals(other)
        # Planning does not fit either.
        code, _, log = call(capsys, "plan", str(tiny.run_file), "--run", str(small / "another"))
        assert code in (2, 5)
        assert "No space left on device" in log
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_what_nobody_expected_is_no_matter_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python's own exit code for it, 1, means that too many images failed."""

    def stumble(*arguments: object, **named: object) -> None:
        raise ZeroDivisionError("what")

    monkeypatch.setattr("owlsam_ray.run.verify.verify_run", stumble)
    assert cli.main(["verify", str(tmp_path)]) == 5
    out, err = capsys.readouterr()
    assert json.loads(out)["error"] == "ZeroDivisionError: what"
    assert "Traceback" in err


def test_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "owlsam_ray", "--version"],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
        cwd=ROOT,
    )
    assert done.stdout.startswith("owlsam 0.")


@pytest.mark.parametrize("error", [OSError, RuntimeError])
def test_errors_of_others_are_cut_and_masked(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> dict[str, Any]:
        raise error(f"no answer of https://ann:hunter2@h/a?sig=f00d\n\x1b[2J{'x' * 10**7}")

    monkeypatch.setitem(cli._ON_DIRECTORY, "status", fail)
    code, summary, log = call(capsys, "status", "somewhere")
    begin = "storage error: " if error is OSError else "RuntimeError: "
    assert (code, summary["error"].startswith(f"{begin}no answer of https://***@h/a?*** \\x1b[2Jxxx")) == (5, True)
    assert len(summary["error"]) < 2200
    assert len(log) < 25_000
    assert not {"hunter2", "f00d", "\x1b"} & set(re.split("[:@=\n\\[]", log + summary["error"]))
