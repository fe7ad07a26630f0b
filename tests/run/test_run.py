"""Opening a run: what is in it, where its data has moved, and the errors of directories that hold none."""

import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import ConfigError, GuardError, IncompleteError, InputError, OwlsamError
from owlsam_ray.run.record import load_record, save_record
from owlsam_ray.run.run import StoredRun, open_labelled_run, open_run, open_stored_run, reopen_run
from tests.fixtures.make_earlier_runs import config_fields

EARLIER = Path(__file__).parents[1] / "fixtures" / "earlier"


@pytest.fixture
def run_url(tmp_path: Path) -> str:
    """A copy of a finished run."""
    shutil.copytree(EARLIER / "finished", tmp_path / "run")
    return str(tmp_path / "run")


def config_of(run_url: str | None, **data: str) -> RunConfig:
    fields = config_fields("") | {"run": run_url}
    return RunConfig.model_validate(fields | {"data": fields["data"] | data})


def unfinished(run_url: str) -> None:
    """Take the mark of the first attempt from the record."""
    record = load_record(run_url)
    assert record is not None
    save_record(run_url, record.model_copy(update={"fingerprint": None, "fingerprint_parts": None}))


def labelled(run_url: str) -> StoredRun:
    return open_labelled_run(config_of(run_url))


def to_label(run_url: str) -> StoredRun | None:
    return open_run(config_of(run_url))


def test_every_way_in_shows_the_same_run(run_url: str) -> None:
    config = config_of(run_url)
    run = open_run(config)
    assert run is not None
    assert (run.url, run.record, run.manifest.num_images) == (run_url, load_record(run_url), 12)
    assert run.config.model_copy(update={"data": config.data}) == config
    assert reopen_run(run.config, run.record) == run
    assert open_labelled_run(config).manifest == run.manifest
    for verify in (True, False):
        assert open_stored_run(run_url, verify=verify) == StoredRun(run.record, run.manifest)


def test_a_run_is_sent_to_processes_whole_and_small(run_url: str) -> None:
    run = open_run(config_of(run_url))
    data = pickle.dumps(run)
    assert pickle.loads(data) == run
    assert len(data) < 20_000


@pytest.mark.parametrize("opening", [labelled, open_stored_run])
def test_a_directory_without_a_run(tmp_path: Path, opening: Callable[[str], object]) -> None:
    with pytest.raises(InputError, match=rf"{tmp_path} holds no run \(no run\.json\)"):
        opening(str(tmp_path))


def test_a_run_that_is_not_planned_yet_is_no_error(tmp_path: Path) -> None:
    assert open_run(config_of(str(tmp_path))) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opening", [open_run, open_labelled_run])
def test_no_run_directory(opening: Callable[[RunConfig], object]) -> None:
    with pytest.raises(ConfigError, match="--run DIR"):
        opening(config_of(None))


@pytest.mark.parametrize(
    "opening", [labelled, to_label, open_stored_run, lambda url: open_stored_run(url, verify=False)]
)
def test_a_missing_manifest(run_url: str, opening: Callable[[str], object]) -> None:
    shutil.rmtree(Path(run_url) / "manifest")
    with pytest.raises(GuardError, match=rf"^{run_url}/manifest is missing: restore it"):
        opening(run_url)


@pytest.mark.parametrize("opening", [labelled, to_label, open_stored_run])
def test_a_manifest_of_other_images(run_url: str, opening: Callable[[str], object]) -> None:
    record = load_record(run_url)
    assert record is not None
    save_record(run_url, record.model_copy(update={"layout_hash": "0" * 64}))
    with pytest.raises(GuardError, match="has the layout hash"):
        opening(run_url)
    assert open_stored_run(run_url, verify=False).manifest.num_images == 12


def test_a_run_without_labels(run_url: str) -> None:
    unfinished(run_url)
    with pytest.raises(IncompleteError, match="nothing was labelled in"):
        open_labelled_run(config_of(run_url))
    assert open_run(config_of(run_url)) is not None


@pytest.mark.parametrize("opening", [open_run, open_labelled_run])
def test_other_settings_are_refused_before_the_manifest_is_read(
    run_url: str, opening: Callable[[RunConfig], object]
) -> None:
    shutil.rmtree(Path(run_url) / "manifest")
    config = config_of(run_url)
    other = config.model_copy(update={"detector": config.detector.model_copy(update={"score_floor": 0.5})})
    with pytest.raises(GuardError, match=r"detector\.score_floor: 0\.05 -> 0\.5"):
        opening(other)


@pytest.mark.parametrize(
    ("data", "refused"),
    [
        ({"annotations": "elsewhere/others.json"}, (GuardError, None, GuardError)),
        ({"images": "mount"}, (None, None, None)),
        ({"source": "lvis"}, (GuardError, None, GuardError)),
    ],
)
def test_other_data(run_url: str, data: dict[str, str], refused: tuple[type[OwlsamError] | None, ...]) -> None:
    """To label, to extend, and to use the labels."""
    config = config_of(run_url, **data)
    ways: list[Callable[[], object]] = [
        lambda: open_run(config),
        lambda: open_run(config, extending=True),
        lambda: open_labelled_run(config),
    ]
    for way, error in zip(ways, refused, strict=True):
        if error is None:
            assert way() is not None
        else:
            with pytest.raises(error, match="was planned with other settings"):
                way()


def test_suffixes_of_the_plan_apply_unless_this_call_sets_them(run_url: str) -> None:
    record = load_record(run_url)
    assert record is not None
    fields = record.config | {"data": record.config["data"] | {"suffixes": [".png"]}}
    save_record(run_url, record.model_copy(update={"config": fields}))
    run = open_run(config_of(run_url))
    assert run is not None
    assert run.config.data.suffixes == (".png",)
    config = config_of(run_url)
    asked = config.model_copy(update={"data": config.data.model_copy(update={"suffixes": (".jpg",)})})
    with pytest.raises(GuardError, match=r"data\.suffixes"):
        open_run(asked)


def test_moved_data(run_url: str) -> None:
    run = open_run(config_of(run_url, images="/mount"))
    assert run is not None
    assert [(move.old, move.new) for move in run.moves] == [("images", "/mount")]
    assert run.manifest.read_shard(0)["uri"].to_pylist()[0].startswith("images/")
    moved = run.with_moves()
    assert moved.manifest.read_shard(0)["uri"].to_pylist()[0].startswith("/mount/")
    assert (moved.config, moved.record, moved.url) == (run.config, run.record, run.url)
    still = open_run(config_of(run_url))
    assert still is not None
    assert still.with_moves() == still


def test_opening_a_run_imports_neither_ray_nor_torch() -> None:
    code = "import sys, owlsam_ray.run.run; sys.exit(bool({'ray', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
