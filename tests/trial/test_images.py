"""A few images in this process: the rows of a run, and torch as it was before."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import ImageError, PreflightError
from owlsam_ray.inference.queries import EmbeddedQueries, embed_vocabulary
from owlsam_ray.models.fakes import FakeDetector
from owlsam_ray.models.load import find_models
from owlsam_ray.parallel.allocation import allocate
from owlsam_ray.records import EncodedImage
from owlsam_ray.trial.images import label_here
from owlsam_ray.vocabulary import resolve_vocabulary
from tests.drawn_images import draw_image
from tests.image_files import save

CONFIG = RunConfig.model_validate(
    {
        "data": {"source": "folder", "images": "/images"},
        "vocabulary": {"categories": ["cat", "dog"]},
        "detector": {"model": "fake"},
        "segment": {"model": "fake"},
        "resources": {"torch_threads": 1},
    }
)
MODELS = find_models(CONFIG.detector, CONFIG.segment)
ALLOCATION = allocate(CONFIG.resources, num_cpus=2, num_gpus=0)
GOOD = EncodedImage.of(save(draw_image(1).resize((24, 20))), image_id=0)
BAD = EncodedImage.of(ImageError("missing"), image_id=1)


@pytest.fixture(scope="module")
def queries() -> EmbeddedQueries:
    return embed_vocabulary(resolve_vocabulary(CONFIG.vocabulary, []), CONFIG, detector_weights=MODELS.detector)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_threads_of_torch_are_restored(queries: EmbeddedQueries, monkeypatch: pytest.MonkeyPatch) -> None:
    detect, seen = FakeDetector.detect, []

    def spy(*arguments: Any) -> Any:
        seen.append(torch.get_num_threads())
        return detect(*arguments)

    monkeypatch.setattr(FakeDetector, "detect", spy)
    rows, rate = label_here([GOOD, BAD], CONFIG, ALLOCATION, models=MODELS, queries=queries)
    assert (set(seen), torch.get_num_threads()) == ({1}, 2)
    assert [row.image_id for row in rows] == [0, 1]
    assert [row.failure is None for row in rows] == [True, False]
    assert rate is None


def test_threads_of_torch_are_restored_when_the_models_do_not_run(
    queries: EmbeddedQueries, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(FakeDetector, "detect", fail)
    with pytest.raises(PreflightError, match=r"do not run on this machine: .*no kernel image"):
        label_here([GOOD], CONFIG, ALLOCATION, models=MODELS, queries=queries)
    assert torch.get_num_threads() == 2


def test_a_rate_needs_an_image_that_is_labelled(queries: EmbeddedQueries) -> None:
    for images, is_measured in (([GOOD, BAD], True), ([BAD], False), ([], False)):
        rows, rate = label_here(images, CONFIG, ALLOCATION, models=MODELS, queries=queries, measure_rate=True)
        assert len(rows) == len(images)
        assert (rate is not None and rate > 0) == is_measured
