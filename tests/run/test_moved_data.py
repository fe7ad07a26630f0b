"""Weights and images under another path: what may move, what is told, and the same labels."""

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from owlsam_ray.cli import main as cli
from owlsam_ray.config.load import config_from_stored
from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import GuardError
from owlsam_ray.plan.plan import plan_run
from owlsam_ray.reduce.run import reduce_run
from owlsam_ray.run.guard import guard_labels
from owlsam_ray.run.manifest import Manifest, moved_uris
from owlsam_ray.run.moved_data import Move, moves_between, without_places
from owlsam_ray.run.planned_settings import check_config
from owlsam_ray.run.record import load_record
from owlsam_ray.run.run import Run
from tests.fixtures.make_earlier_runs import config_fields
from tests.runs import label_here

EARLIER = Path(__file__).parents[1] / "fixtures" / "earlier"


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(EARLIER, tmp_path / "earlier")
    monkeypatch.chdir(tmp_path / "earlier")
    return tmp_path / "earlier"


def config_of(run: str, **data: str) -> RunConfig:
    fields = config_fields(run)
    return RunConfig.model_validate(fields | {"data": fields["data"] | data})


@pytest.mark.parametrize(
    ("then", "now", "uri", "expected"),
    [
        ({"images": "/old/set"}, {"images": "/new"}, "/old/set/a/b.jpg", "/new/a/b.jpg"),
        ({"images": "/old/set/"}, {"images": "s3://bucket/x/"}, "/old/set/a.jpg", "s3://bucket/x/a.jpg"),
        ({"images": "s3://a/b"}, {"images": "/c"}, "s3://a/b/x", "/c/x"),
        ({"images": "/old"}, {"images": "/new"}, "/older/a.jpg", "/older/a.jpg"),
        ({"images": "/old"}, {"images": "/new"}, "http://host/old/a.jpg", "http://host/old/a.jpg"),
        ({"images": "/old"}, {"images": "/old/"}, "/old/a.jpg", "/old/a.jpg"),
        ({"files": ["/a/b/t/*.tar"]}, {"files": ["/c/t/*.tar"]}, "/a/b/t/1.tar", "/c/t/1.tar"),
        ({"files": ["/a/x.parquet"]}, {"files": ["/b/y.parquet"]}, "/a/x.parquet", "/a/x.parquet"),
    ],
)
def test_moves(then: dict[str, Any], now: dict[str, Any], uri: str, expected: str) -> None:
    for move in moves_between(then, now):
        uri = move.apply(uri)
    assert uri == expected


def test_a_move_and_back() -> None:
    move = Move("/a", "s3://b/c")
    for uri in ("/a/x/y.png", "/ab/x", "/a"):
        assert move.back().apply(move.apply(uri)) == uri


def test_a_new_root_that_is_the_old_one_of_another_move() -> None:
    table = pa.table({"uri": ["/a/1.jpg", "/b/2.tar", "/a/in/3.jpg", "/c/4.jpg"]})
    moved = moved_uris(table, (Move("/a", "/b"), Move("/b", "/c"), Move("/a/in", "/d")))
    assert moved["uri"].to_pylist() == ["/b/1.jpg", "/c/2.tar", "/d/3.jpg", "/c/4.jpg"]


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"detector": {"weights": "elsewhere"}}, True),
        ({"segment": {"weights": "elsewhere.pt"}}, True),
        ({"data": {"images": "/elsewhere"}}, True),
        ({"data": {"annotations": "/elsewhere/instances.json"}}, True),
        ({"data": {"annotations": "/elsewhere/others.json"}}, False),
        ({"data": {"suffixes": [".ppm"]}}, False),
        ({"detector": {"model": "owlv2"}}, False),
        ({"vocabulary": {"categories": ["one"]}}, False),
    ],
)
def test_what_may_lie_elsewhere_on_one_run(changes: dict[str, dict[str, Any]], same: bool) -> None:
    record = load_record(str(EARLIER / "finished"))
    assert record is not None
    there = record.stored_config().frozen_fields()
    here = {name: section | changes.get(name, {}) for name, section in there.items()}
    theirs, ours = without_places(there, here, any_data=False)
    assert (theirs == ours) == same


def test_a_half_done_run_goes_on_where_its_images_moved_to(earlier: Path, tmp_path: Path) -> None:
    layout = json.loads((earlier / "half_done" / "run.json").read_text())["layout_hash"]
    (earlier / "images").rename(tmp_path / "mount")
    shutil.move(earlier / "instances.json", tmp_path / "instances.json")
    moved = config_of("half_done", images=str(tmp_path / "mount"), annotations=str(tmp_path / "instances.json"))
    labels = label_here(moved, allow_numerics_change=True)
    record = load_record("half_done")
    assert record is not None
    assert record.layout_hash == layout
    reduce_run(config_of("finished", images="nowhere"))
    assert labels == (earlier / "finished" / "coco" / "annotations.json").read_bytes()


def test_other_files_at_the_new_place_are_refused(earlier: Path, tmp_path: Path) -> None:
    shutil.copytree(earlier / "images", tmp_path / "mount")
    config = config_of("half_done", images=str(tmp_path / "mount"))
    uris = plan_run(config).run.manifest.read_shard(1)["uri"].to_pylist()
    assert uris == [str(tmp_path / "mount" / name) for name in ("b/03.png", "a/04.png", "b/05.png")]
    (tmp_path / "mount" / "b" / "03.png").write_bytes(b"other")
    with pytest.raises(GuardError, match=r"03\.png has 5 bytes, but 155 at its old path"):
        plan_run(config)
    shutil.rmtree(tmp_path / "mount")
    with pytest.raises(GuardError, match="of 12 sampled files, 12 are missing and 0 differ"):
        plan_run(config)


def test_sizes_that_were_planned_are_compared_where_the_old_place_is_gone(tmp_path: Path) -> None:
    shutil.copytree(EARLIER / "images", tmp_path / "old")
    data = {"source": "folder", "images": str(tmp_path / "old")}
    config = RunConfig.model_validate(config_fields(str(tmp_path / "run")) | {"data": data})
    plan_run(config)
    (tmp_path / "old").rename(tmp_path / "new")
    moved = config.model_copy(update={"data": config.data.model_copy(update={"images": str(tmp_path / "new")})})
    bounds = [uri for _, uris in plan_run(moved).run.manifest.uri_bounds() for uri in uris]
    assert bounds
    assert all(uri.startswith(str(tmp_path / "new")) for uri in bounds)
    (tmp_path / "new" / "a" / "02.png").write_bytes(b"another")
    with pytest.raises(GuardError, match=r"02\.png has 7 bytes, but had 203 when it was planned"):
        plan_run(moved)


def test_members_of_tar_files_at_the_new_place(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with tarfile.open(tmp_path / "old" / "0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.add(EARLIER / "images" / "a" / "00.png", "00.png")
    data = {"source": "webdataset", "files": [str(tmp_path / "old" / "*.tar")]}
    config = RunConfig.model_validate(config_fields(str(tmp_path / "run")) | {"data": data})
    plan_run(config)
    (tmp_path / "old").rename(tmp_path / "new")
    files = (str(tmp_path / "new" / "*.tar"),)
    moved = config.model_copy(update={"data": config.data.model_copy(update={"files": files})})
    assert plan_run(moved).run.manifest.read_shard(0)["uri"].to_pylist() == [str(tmp_path / "new" / "0.tar")]
    with (tmp_path / "new" / "0.tar").open("r+b") as file:
        file.truncate(600)
    with pytest.raises(GuardError, match=r"0\.tar has 600 bytes, but one of its images ends at byte 687"):
        plan_run(moved)


def test_an_extension_at_the_new_place_keeps_the_old_names(earlier: Path, tmp_path: Path) -> None:
    listing = json.loads((earlier / "instances.json").read_text())
    listing["images"].append({"id": 900, "file_name": "new.png"})
    (earlier / "instances.json").write_text(json.dumps(listing))
    shutil.copy(earlier / "images" / "a" / "00.png", earlier / "images" / "new.png")
    (earlier / "images").rename(tmp_path / "mount")
    config = config_of("half_done", images=str(tmp_path / "mount"))
    plan = plan_run(config, extend=True)
    assert plan.new == 1
    record = load_record("half_done")
    assert record is not None
    assert record.config["data"]["images"] == "images"
    assert plan.run.manifest.read_shard(4)["uri"].to_pylist() == ["images/new.png"]
    again = plan_run(config)
    assert again.run.manifest.read_shard(4)["uri"].to_pylist() == [str(tmp_path / "mount" / "new.png")]
    assert plan_run(config, extend=True).new == 0


def test_weights_are_compared_by_what_they_hold() -> None:
    record = load_record(str(EARLIER / "finished"))
    assert record is not None
    config = config_from_stored(record.config)
    elsewhere = config.model_copy(update={"detector": config.detector.model_copy(update={"weights": "/mnt/x"})})
    run = Run(record, Manifest("run", ()), elsewhere)
    check_config(elsewhere, record)
    assert record.fingerprint_parts is not None
    parts = record.fingerprint_parts | {"config": elsewhere.label_fields()}
    assert guard_labels(run, parts) == run
    other = parts | {"weights": {"detector": "0" * 64, "segmenter": parts["weights"]["segmenter"]}}
    with pytest.raises(GuardError, match=r"weights\.detector: 'd315.* -> '0000"):
        guard_labels(run, other)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = cli.main(list(arguments))
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_reduce_and_evaluate_need_neither_weights_nor_images(earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run files say little or something else about where they are; the run says the rest."""
    shutil.rmtree(earlier / "images")
    (earlier / "little.yaml").write_text("reduce: {min_mask_area: 0, max_failed: 1}\n")
    (earlier / "moved.yaml").write_text(
        "detector: {weights: gone}\nsegment: {weights: gone.pt}\ndata: {images: gone}\n"
    )
    code, summary = call(
        capsys, "reduce", "little.yaml", "moved.yaml", "--run", "finished", "--set", "reduce.workers=1"
    )
    assert (code, summary["images"], summary["num_annotations"]) == (0, 12, 30)
    assert call(capsys, "evaluate", "little.yaml", "moved.yaml", "--run", "finished")[0] == 0
    assert call(capsys, "review-list", "little.yaml", "--run", "finished")[0] == 0
    assert call(capsys, "calibrate", "little.yaml", "--run", "finished")[0] == 0


def test_a_run_file_that_contradicts_the_run_is_still_refused(
    earlier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (earlier / "other.yaml").write_text("detector: {score_floor: 0.3}\n")
    code, summary = call(capsys, "reduce", "other.yaml", "--run", "finished")
    assert code == 3
    assert "detector.score_floor: 0.05 -> 0.3" in summary["error"]
    (earlier / "other.yaml").write_text(
        "data: {source: folder, images: x}\ndetector: {model: fake}\nsegment: {model: fake}\n"
    )
    code, summary = call(capsys, "reduce", "other.yaml", "--run", "finished")
    assert code == 3
    assert "data.source: 'coco' -> 'folder'" in summary["error"]
