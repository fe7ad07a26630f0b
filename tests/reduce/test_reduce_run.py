"""The whole command on labelled runs: settings, --out, --partial, two at once, S3, Ray; and the plug pulled."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from owlsam_ray import storage
from owlsam_ray.config.load import load_config
from owlsam_ray.errors import AttemptLiveError, GuardError, IncompleteError, InputError
from owlsam_ray.reduce.run import reduce_run
from owlsam_ray.run.attempts import SETUP, Slice, safe_file_name
from owlsam_ray.run.claim import claim
from owlsam_ray.run.shards import shard_url
from tests.bench.reducing import make_run
from tests.chaos.world import small_disk
from tests.faulty_s3 import Faults, faulty_s3

_FILES = ("annotations.json", "failures.jsonl", "reduce.json")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 400 images and 12,000 detections in shards of 20."""
    root = tmp_path_factory.mktemp("labelled")
    make_run(root, 12_000, shard_size=20)
    return root


def slow_seeds(seeds: range) -> list[Any]:
    return [pytest.param(seed, marks=pytest.mark.slow) for seed in seeds]


def reduced(root: Path, out: Path | str, *overrides: str, partial: bool = False) -> dict[str, Any]:
    settings = [f"reduce.out={out}", *(f"reduce.{each}" for each in overrides)]
    config = load_config([root / "run.yaml"], run=str(root / "run"), overrides=settings)
    return reduce_run(config, partial=partial)


def contents(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_workers_and_storages_give_the_same_bytes(labelled: Path, tmp_path: Path) -> None:
    counts = reduced(labelled, tmp_path / "one", "workers=1")
    expected = contents(tmp_path / "one")
    assert set(expected) == set(_FILES)
    assert (counts["images"], counts["ok"], counts["num_annotations"]) == (400, 400, 12_000)
    reduced(labelled, tmp_path / "two", "workers=2")
    assert contents(tmp_path / "two") == expected
    with faulty_s3() as server:
        server.faults = Faults(seed=3, rate=0.2, kinds=("500", "503"))
        storage.configure(storage.StoragePolicy(backoff_s=0.01))
        reduced(labelled, "s3://labels/out", "workers=2")
        server.faults = Faults()
        names = dict(storage.walk_files("s3://labels/out"))
        assert {name: storage.read_bytes(f"s3://labels/out/{name}") for name in names} == expected
    storage.configure(storage.StoragePolicy())


@pytest.mark.slow
def test_ray_gives_the_same_bytes(labelled: Path, tmp_path: Path) -> None:
    reduced(labelled, tmp_path / "one", "workers=1")
    reduced(labelled, tmp_path / "ray", "workers=2", "executor=ray")
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")


def test_many_ways_side_by_side(labelled: Path, tmp_path: Path) -> None:
    whole = reduced(labelled, tmp_path / "whole")
    strict = reduced(
        labelled, tmp_path / "strict", "score_threshold=0.5", "score_thresholds={thing 1: 0.9}", "max_per_image=10",
        "min_mask_area=2000", "only=[1, thing 2, thing 3]", "suppress={strategy: nms, threshold: 0.5}",
    )  # fmt: skip
    assert strict["num_annotations"] + sum(strict["left_out"].values()) == whole["num_annotations"]
    assert set(strict["left_out"]) >= {"category", "score", "small_mask"}
    tree = json.loads((tmp_path / "strict" / "annotations.json").read_bytes())
    assert [each["id"] for each in tree["categories"]] == [1, 2, 3]
    assert all(each["score"] > (0.9 if each["category_id"] == 1 else 0.5) for each in tree["annotations"])
    info = tree["info"]["owlsam_ray"]
    assert info["score_thresholds"] == {"thing 1": 0.9}
    assert info["suppress"]["threshold"] == 0.5
    assert info["proof"]["left_out"] == strict["left_out"]
    everything = json.loads((tmp_path / "whole" / "annotations.json").read_bytes())["annotations"]
    of_whole = {each["id"]: each for each in everything}
    assert all(of_whole[each["id"]] == each for each in tree["annotations"])


def test_names_of_ones_own(labelled: Path, tmp_path: Path) -> None:
    reduced(labelled, tmp_path, "mapping={thing 1: animal, thing 7: car, thing 2: animal}")
    tree = json.loads((tmp_path / "annotations.json").read_bytes())
    assert [(each["id"], each["name"]) for each in tree["categories"]] == [(1, "animal"), (2, "car")]
    assert {each["category_id"] for each in tree["annotations"]} == {1, 2}


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("only=[cat]", Exception, "reduce.only names 'cat'"),
        ("score_thresholds={thing1: 0.5}", Exception, "did you mean 'thing 1'"),
        ("mapping=lvis_to_coco", InputError, "maps the categories of lvis"),
        ("mapping={cat: dog}", Exception, "reduce.mapping names 'cat'"),
        ("images_per_file=5", InputError, "less than the 20 images of a shard"),
        ("score_threshold=0.01", Exception, "below detector.score_floor"),
        ("suppress={strategy: nms, threshold: 0.9}", Exception, "looser than suppress.threshold"),
        ("suppress={strategy: nms, thresholds: {thing 1: 0.9}}", Exception, "thresholds.thing 1 0.9 is looser"),
        ("only=[]", Exception, "keep no category"),
        ("operating_points=/nowhere.json", InputError, "cannot read reduce.operating_points"),
        ("formats=[coco, coco]", Exception, "a format is listed twice"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_written(
    labelled: Path, tmp_path: Path, override: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        reduced(labelled, tmp_path / "out", override)
    assert not (tmp_path / "out" / "annotations.json").exists()


def test_operating_points_are_thresholds_of_categories(labelled: Path, tmp_path: Path) -> None:
    record = json.loads((labelled / "run" / "run.json").read_text())
    points = {"version": 1, "fingerprint": record["fingerprint"], "target": {"precision": 0.9}}
    points["categories"] = [{"category_id": 3, "name": "thing 3", "threshold": 0.8, "more": [1]}]
    file = tmp_path / "points.json"
    file.write_text(json.dumps(points))
    reduced(labelled, tmp_path / "out", f"operating_points={file}", "score_threshold=0.6")
    tree = json.loads((tmp_path / "out" / "annotations.json").read_bytes())
    assert all(each["score"] > (0.8 if each["category_id"] == 3 else 0.6) for each in tree["annotations"])
    assert tree["info"]["owlsam_ray"]["operating_points"]["thresholds"] == {"thing 3": 0.8}
    file.write_text(json.dumps(points | {"fingerprint": "other"}))
    with pytest.raises(GuardError, match="calibrated on other labels"):
        reduced(labelled, tmp_path / "out", f"operating_points={file}")


def test_operating_points_that_do_not_fit_are_refused_or_told(
    labelled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = json.loads((labelled / "run" / "run.json").read_text())
    ids = {each["name"]: each["id"] for each in record["categories"]}
    file = tmp_path / "points.json"

    def apply(*names: str, overrides: tuple[str, ...] = (), **more: object) -> str:
        points = [{"category_id": ids[name], "name": name, "threshold": 0.8} for name in names]
        file.write_text(json.dumps(
            {"version": 1, "fingerprint": record["fingerprint"], "target": {}, "categories": points} | more
        ))  # fmt: skip
        caplog.clear()
        reduced(labelled, tmp_path / "out", f"operating_points={file}", *overrides)
        return "\n".join(each.getMessage() for each in caplog.records if each.levelname == "WARNING")

    for wrong, words in (
        ({"category_id": ids["thing 3"], "name": "thing 4", "threshold": 0.8}, "'thing 4' with the id 3, .* 'thing 3'"),
        ({"category_id": ids["thing 1"], "name": "thing 1", "threshold": 0.9}, "two thresholds for 'thing 1'"),
    ):
        points = [{"category_id": ids["thing 1"], "name": "thing 1", "threshold": 0.8}, wrong]
        with pytest.raises(InputError, match=words):
            apply(categories=points)
    assert not (tmp_path / "out" / "annotations.json").exists()

    settings = {"score_threshold": None, "min_mask_area": 0}
    assert apply(*ids, settings=settings) == ""
    some = list(ids)[:2]
    told = apply(*some, settings=settings)
    assert (
        f"no threshold for {len(ids) - 2} of {len(ids)} categories, which keep all scores above the score floor" in told
    )
    assert f": {', '.join(list(ids)[2:7])}" in told
    assert "above score_threshold 0.6" in apply(*some, overrides=("score_threshold=0.6",))
    # Who is not in the output, or has a threshold of its own, needs none.
    only = f"only=[{some[0]}, {list(ids)[2]}]"
    assert "for 1 of 2 categories" in apply(*some, overrides=(only,))
    assert apply(*some, overrides=(only, f"score_thresholds={{{list(ids)[2]}: 0.7}}")) == ""
    told = apply(*ids, settings=settings, overrides=("min_mask_area=7", "max_per_image=3", "provenance=true"))
    assert "other settings" in told
    assert told.endswith("min_mask_area (0 there, 7 here), max_per_image (None there, 3 here)")


def test_an_unfinished_run_is_reduced_when_asked_and_says_so(labelled: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(labelled, root)
    run_file = json.loads((root / "run.yaml").read_text())
    run_file["data"]["images"] = str(labelled)
    (root / "run.yaml").write_text(json.dumps(run_file))
    for shard in (3, 4, 19):
        Path(shard_url(str(root / "run"), shard)).unlink()
    with pytest.raises(IncompleteError, match="3 of 20 shards"):
        reduced(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(IncompleteError, match="60 of 400 images") as caught:
        reduced(root, tmp_path / "out", partial=True)
    assert caught.value.args[1]["unlabelled"] == 60
    tree = json.loads((tmp_path / "out" / "annotations.json").read_bytes())
    assert len(tree["images"]) == 340
    proof = tree["info"]["owlsam_ray"]["proof"]
    assert (proof["partial"], proof["unlabelled"], proof["images"]) == (True, 60, 400)


def test_two_at_once_on_one_directory_are_refused(labelled: Path, tmp_path: Path) -> None:
    with (
        claim(str(tmp_path), scope=SETUP, part=Slice(), heartbeat_s=0.2, takeover_s=5.0),
        pytest.raises(AttemptLiveError, match="another attempt"),
    ):
        reduced(labelled, tmp_path)
    reduced(labelled, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(_FILES)


def test_what_a_call_left_that_was_killed_while_it_wrote_its_claim_goes_with_the_next(
    labelled: Path, tmp_path: Path
) -> None:
    host, gone = safe_file_name(socket.gethostname()), subprocess.Popen(["true"])
    gone.wait()
    alive = f".tmp-20261130T225607Z-{host}-{os.getpid()}-e78342-setup.json-{'d' * 32}"
    elsewhere = f".tmp-20261130T225607Z-{host}x-{gone.pid}-e78342-setup.json-{'d' * 32}"
    (tmp_path / "attempts").mkdir()
    for name in (alive, elsewhere, f".tmp-20261130T225607Z-{host}-{gone.pid}-e78342-setup.json-{'d' * 32}"):
        (tmp_path / "attempts" / name).write_text('{"id":')
    reduced(labelled, tmp_path)
    assert sorted(path.name for path in (tmp_path / "attempts").iterdir()) == sorted([alive, elsewhere])


def test_what_people_keep_beside_the_files_stays(labelled: Path, tmp_path: Path) -> None:
    """Pictures in the folder of YOLO, files whose names are near ours; only ours go when they are not asked for."""
    kept = ("yolo/images/a.jpg", "yolo/notes.txt", "fragments-mine/x", ".tmp-mine", "attempts/mine.json", "mine.json")
    for name in kept:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    reduced(labelled, tmp_path, "formats=[coco, yolo]")
    first = contents(tmp_path)
    reduced(labelled, tmp_path, "formats=[yolo]", "score_threshold=0.5")
    assert "annotations.json" not in contents(tmp_path)
    assert contents(tmp_path)["yolo/labels/train/000000000001.txt"] != first["yolo/labels/train/000000000001.txt"]
    reduced(labelled, tmp_path)
    assert contents(tmp_path) == {name: name.encode() for name in kept} | {name: first[name] for name in _FILES[:2]} | {
        "reduce.json": contents(tmp_path)["reduce.json"]
    }
    reduced(labelled, tmp_path, "formats=[coco, yolo]")
    assert contents(tmp_path) == first
    forged = {"files": ["mine.json", "../mine.json", "yolo/images"]}
    (tmp_path / "reduce.json").write_text(json.dumps(forged))
    with pytest.raises(InputError, match=r"holds annotations.json, which reduce did not write"):
        reduced(labelled, tmp_path)
    assert all((tmp_path / name).is_file() for name in kept)


def test_a_run_directory_is_no_place_for_files(labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a run directory"):
        reduced(labelled, labelled / "run")
    (tmp_path / "link").symlink_to(labelled / "run" / "predictions")
    for place in (labelled / "run" / "manifest", labelled / "run" / "attempts" / "x", tmp_path / "link"):
        with pytest.raises(InputError, match="of the run"):
            reduced(labelled, place)
    assert (labelled / "run" / "predictions").is_dir()


def test_what_is_read_is_not_written_over(labelled: Path, tmp_path: Path) -> None:
    reduced(labelled, tmp_path)
    before = contents(tmp_path)
    for override in (f"corrections={tmp_path}/annotations.json", f"operating_points={tmp_path}/x/../annotations.json"):
        with pytest.raises(InputError, match="is in the output directory, under a name that reduce itself writes"):
            reduced(labelled, tmp_path, override)
    assert contents(tmp_path) == before


def test_what_no_reduce_has_written_is_not_replaced(labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "yolo" / "labels").mkdir(parents=True)
    (tmp_path / "yolo" / "labels" / "mine.txt").write_text("0 0.5 0.5 1 1")
    with pytest.raises(InputError, match="holds yolo, which reduce did not write"):
        reduced(labelled, tmp_path, "formats=[coco, yolo]")
    assert set(contents(tmp_path)) == {"yolo/labels/mine.txt"}
    reduced(labelled, tmp_path)
    assert "yolo/labels/mine.txt" in contents(tmp_path)


def test_what_a_dead_reduce_left_goes_with_the_next(labelled: Path, tmp_path: Path) -> None:
    """The list of files was gone, and the new one not there yet."""
    reduced(labelled, tmp_path, "formats=[coco, coco_results]", "images_per_file=100")
    (tmp_path / "reduce.json").rename(tmp_path / "reduce.unfinished")
    reduced(labelled, tmp_path)
    assert set(contents(tmp_path)) == set(_FILES)


def command(root: Path, out: Path | str, *overrides: str) -> list[str]:
    settings = [f"--set=reduce.{each}" for each in (f"out={out}", "workers=2", *overrides)]
    return [sys.executable, "-m", "owlsam_ray", "reduce", str(root / "run.yaml"), "--run", str(root / "run"), *settings]


@pytest.fixture(scope="module")
def versions(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bytes]]:
    """What two different reduces of the run give."""
    out = tmp_path_factory.mktemp("versions")
    reduced(labelled, out / "a")
    reduced(labelled, out / "b", "score_threshold=0.5")
    return [contents(out / "a"), contents(out / "b")]


def check_nothing_is_wrong(found: dict[str, bytes], versions: list[dict[str, bytes]]) -> None:
    """Every file under a final name is whole, of one reduce or of the other; `reduce.json` stands beside its own."""
    for name in _FILES:
        assert name not in found or found[name] in [version[name] for version in versions], name
    if "reduce.json" in found:
        mine = next(version for version in versions if version["reduce.json"] == found["reduce.json"])
        assert {name: found[name] for name in _FILES} == mine


def started(labelled: Path, out: Path) -> subprocess.Popen[bytes]:
    """A reduce that has begun: its claim stands in the directory."""
    process = subprocess.Popen(
        command(labelled, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None and not any(out.glob("attempts/*")):
        time.sleep(0.005)
    return process


@pytest.fixture(scope="module")
def usual_s(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Seconds from there to the end."""
    process = started(labelled, tmp_path_factory.mktemp("usual"))
    start = time.monotonic()
    assert process.wait() == 0
    return time.monotonic() - start


@pytest.mark.parametrize("seed", [*range(2), *slow_seeds(range(2, 8))])
def test_a_killed_reduce_leaves_nothing_that_is_wrong(
    labelled: Path, versions: list[dict[str, bytes]], usual_s: float, tmp_path: Path, seed: int
) -> None:
    print(f"seed {seed}")
    if seed % 2:
        reduced(labelled, tmp_path, "score_threshold=0.5")
    process = started(labelled, tmp_path)
    time.sleep(random.Random(seed).random() * usual_s)
    os.killpg(process.pid, signal.SIGKILL)
    print("ended with", process.wait(), "leaving", sorted({name.split("/")[0] for name in contents(tmp_path)}))
    check_nothing_is_wrong(contents(tmp_path), versions)
    reduced(labelled, tmp_path)
    assert contents(tmp_path) == versions[0]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as root:
        if not os.path.ismount(root):
            pytest.skip("cannot mount a small file system")
        yield root


@pytest.mark.parametrize("seed", [*range(1), *slow_seeds(range(1, 6))])
def test_a_full_disk_leaves_nothing_that_is_wrong(
    labelled: Path, versions: list[dict[str, bytes]], disk: Path, seed: int
) -> None:
    """At the first fragments, at the last ones, in the middle of the file."""
    print(f"seed {seed}")
    whole = sum(map(len, versions[0].values()))
    room = int(2 * whole * random.Random(seed).random())
    free = shutil.disk_usage(disk).free
    with (disk / "ballast").open("wb") as ballast:
        left = max(0, free - room)
        while left > 0:
            left -= ballast.write(bytes(min(left, 2**20)))
    out = disk / "out"
    out.mkdir()
    ended = subprocess.run(command(labelled, out), capture_output=True, text=True, check=False)
    assert ended.returncode in (2, 5), ended.stderr
    assert "No space left" in ended.stderr
    check_nothing_is_wrong(contents(out), versions)
    assert not list(out.glob("owlsam-fragments-*"))
    (disk / "ballast").unlink()
    reduced(labelled, out)
    assert contents(out) == versions[0]


@pytest.mark.parametrize("seed", [*range(2), *slow_seeds(range(2, 6))])
def test_a_failed_upload_leaves_nothing_that_is_wrong(
    labelled: Path, versions: list[dict[str, bytes]], seed: int
) -> None:
    """Every request from one on fails, for a while."""
    print(f"seed {seed}")
    choose = random.Random(seed)
    url = "s3://labels/out"
    with faulty_s3() as server:
        storage.configure(storage.StoragePolicy(retries=1, backoff_s=0.01))
        if seed % 2:
            reduced(labelled, url, "score_threshold=0.5")
        target = choose.choice(["annotations.json", "failures.jsonl", "reduce.json"])
        kind = choose.choice(["500", "cut"])
        server.faults = Faults(always={f"PUT /labels/out/{target}": kind, f"POST /labels/out/{target}": kind})
        with pytest.raises(OSError, match=target):
            reduced(labelled, url)
        server.faults = Faults()
        names = [name for name, _ in storage.walk_files(url)]
        check_nothing_is_wrong({name: storage.read_bytes(f"{url}/{name}") for name in names}, versions)
        reduced(labelled, url)
        names = [name for name, _ in storage.walk_files(url)]
        assert {name: storage.read_bytes(f"{url}/{name}") for name in names} == versions[0]
    storage.configure(storage.StoragePolicy())
