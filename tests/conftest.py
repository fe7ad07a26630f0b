"""Fixtures that every test may use."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from owlsam_ray.config.load import load_config
from tests.runs import TWO_ACTORS, TinyRun, label_here, make_tiny_run

_LONG = ("demo/test_run", "annotate/test_isolate", "reduce/test_reduce_run", "models/test_mobile_sam")
"""Files with minutes of work: they begin first, so that no process is left alone with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first; the others stay in their order."""

    def place(item: pytest.Item) -> int:
        path = item.path.with_suffix("").as_posix()
        return next((number for number, name in enumerate(_LONG) if path.endswith(name)), len(_LONG))

    items.sort(key=place)


@pytest.fixture(autouse=True)
def _log_of_its_own() -> Iterator[None]:
    """A command that ran in this process leaves its level, and a handler on a stream that is closed by now."""
    ours = logging.getLogger("owlsam_ray")
    yield
    ours.handlers, ours.propagate = [], True
    ours.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the checkout, or at OWLSAM_SHARED."""
    root = Path(os.environ.get("OWLSAM_SHARED", Path(__file__).parents[2] / "shared"))
    if not (root / "golden").is_dir():
        pytest.skip(f"no reference data at {root}: set OWLSAM_SHARED")
    return root


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """320 drawn images with tiny models; tests make run directories of it."""
    return make_tiny_run(tmp_path_factory.mktemp("tiny"), num_images=320)


@pytest.fixture(scope="session")
def uninterrupted(tiny: TinyRun) -> bytes:
    """The COCO file of a run with shards of 8, labelled in this process; the run is `tiny.root / "uninterrupted"`."""
    run = str(tiny.root / "uninterrupted")
    return label_here(load_config([tiny.run_file], run=run, overrides=["resources.shard_size=8"]))


@pytest.fixture(scope="session")
def undisturbed_on_ray(tiny: TinyRun) -> Path:
    """The same by the command, with two actors on Ray, and reduced. For slow tests."""
    run = tiny.root / "undisturbed-on-ray"
    assert tiny.call("annotate", run, **TWO_ACTORS)["done"] == tiny.num_images
    tiny.call("reduce", run)
    return run
