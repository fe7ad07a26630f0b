"""Opening an engine: the arithmetic is that of the run, whatever it was in this process."""

from collections.abc import Iterator

import pytest
import torch

from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import InputError
from owlsam_ray.inference.load import open_engine
from owlsam_ray.inference.queries import EmbeddedQueries, embed_vocabulary
from owlsam_ray.models.arithmetic import restored_arithmetic
from owlsam_ray.models.load import find_models
from owlsam_ray.parallel.allocation import allocate
from owlsam_ray.records import EncodedImage
from owlsam_ray.vocabulary import resolve_vocabulary

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


@pytest.fixture
def queries() -> EmbeddedQueries:
    return embed_vocabulary(resolve_vocabulary(CONFIG.vocabulary, []), CONFIG, detector_weights=MODELS.detector)


@pytest.fixture
def other_arithmetic() -> Iterator[None]:
    with restored_arithmetic():
        torch.set_num_threads(2)
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = True, False
        yield


def arithmetic() -> tuple[int, bool, bool]:
    return torch.get_num_threads(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic


@pytest.mark.usefixtures("other_arithmetic")
def test_the_arithmetic_is_fixed_and_restored(queries: EmbeddedQueries) -> None:
    with restored_arithmetic():
        with open_engine(CONFIG, ALLOCATION, models=MODELS, queries=queries) as engine:
            assert arithmetic() == (1, False, True)
            (row,), _ = engine.annotate([EncodedImage(7, b"")])
        assert arithmetic() == (1, False, True)
    assert arithmetic() == (2, True, False)
    assert (row.image_id, row.status) == (7, "failed")


def test_a_threshold_of_an_unknown_category_is_refused(queries: EmbeddedQueries) -> None:
    suppress = CONFIG.suppress.model_copy(update={"thresholds": {"horse": 0.5}})
    with pytest.raises(InputError, match="'horse'"):
        open_engine(CONFIG.model_copy(update={"suppress": suppress}), ALLOCATION, models=MODELS, queries=queries)
