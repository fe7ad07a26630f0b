"""A GPU that runs out of memory: the same rows from more calls of the same shape, or the size that fits."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from owlsam_ray.config.inference import DecodeConfig, DetectorConfig, SegmentConfig, SuppressConfig
from owlsam_ray.errors import PreflightError
from owlsam_ray.inference.engine import Engine
from owlsam_ray.inference.work_items import EngineSettings
from owlsam_ray.records import EncodedImage
from owlsam_ray.schema import predictions_to_table
from tests.inference.test_engine import BoxSegmenter, ColourDetector, encoded

Rule = Callable[[Tensor], bool]
IMAGES = [encoded(number, 60 + 9 * number) for number in range(20)]


def used(batch: Tensor) -> int:
    """Rows of a padded batch that hold a picture."""
    return int((batch.flatten(1).amax(dim=1) > 0).sum())


class ShortDetector(ColourDetector):
    def __init__(self, runs_out: Rule) -> None:
        super().__init__()
        self.runs_out = runs_out

    def detect(self, batch: Tensor, query_embeddings: Tensor) -> tuple[Tensor, Tensor]:
        found = super().detect(batch, query_embeddings)
        if self.runs_out(batch):
            raise torch.OutOfMemoryError
        return found


class ShortSegmenter(BoxSegmenter):
    def __init__(self, encoder: Rule = lambda batch: False, decoder: Rule = lambda boxes: False) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def encode(self, batch: Tensor) -> Tensor:
        embeddings = super().encode(batch)
        if self.encoder(batch):
            raise torch.OutOfMemoryError
        return embeddings

    def decode(
        self,
        embeddings: Tensor,
        image_index: Tensor,
        boxes_xyxy: Tensor,
        *,
        multimask: bool,
        center_point: bool = False,
    ) -> tuple[Tensor, Tensor]:
        found = super().decode(embeddings, image_index, boxes_xyxy, multimask=multimask, center_point=center_point)
        if self.decoder(boxes_xyxy):
            raise torch.OutOfMemoryError
        return found


def engine(detector: ColourDetector, segmenter: BoxSegmenter) -> Engine:
    return Engine(
        detector,
        segmenter,
        query_embeddings=torch.zeros(1, 4),
        query_labels=[0],
        settings=EngineSettings(
            decode=DecodeConfig(),
            detector=DetectorConfig(weights="unused", score_floor=0.1),
            suppress=SuppressConfig(),
            segment=SegmentConfig(weights="unused"),
            detector_batch=8,
            segmenter_batch=4,
            decoder_batch=16,
            threads=2,
        ),
    )


def rows(detector: ColourDetector, segmenter: BoxSegmenter, images: list[EncodedImage] = IMAGES) -> object:
    with engine(detector, segmenter) as one:
        return predictions_to_table(one.annotate(images)[0]).to_pylist()


def test_halves_of_the_same_shape_give_the_same_rows() -> None:
    detector = ShortDetector(lambda batch: used(batch) > 3)
    segmenter = ShortSegmenter(encoder=lambda batch: used(batch) > 2)
    assert rows(detector, segmenter) == rows(ColourDetector(), BoxSegmenter())
    assert {shape[0] for shape in detector.calls} == {8}
    assert {shape[0] for shape in segmenter.encoder_calls} == {4}
    assert set(segmenter.decoder_calls) == {16}
    assert len(detector.calls) > 3


def test_once_is_no_rule() -> None:
    times = iter([True])
    detector = ShortDetector(lambda batch: next(times, False))
    assert rows(detector, BoxSegmenter()) == rows(ColourDetector(), BoxSegmenter())


@pytest.mark.parametrize(
    ("detector", "segmenter", "setting", "fits"),
    [
        (ShortDetector(lambda batch: len(batch) > 3), BoxSegmenter(), "detector_batch 8", "detector_batch=2"),
        (ColourDetector(), ShortSegmenter(encoder=lambda b: len(b) > 1), "segmenter_batch 4", "segmenter_batch=1"),
        (ColourDetector(), ShortSegmenter(decoder=lambda b: len(b) > 9), "decoder_batch 16", "decoder_batch=8"),
    ],
)
def test_the_size_that_fits_is_told(detector: ColourDetector, segmenter: BoxSegmenter, setting: str, fits: str) -> None:
    with engine(detector, segmenter) as one, pytest.raises(PreflightError, match=f"{setting} .*{fits}") as told:
        one.annotate(IMAGES)
    assert "--allow-numerics-change" in str(told.value)


def test_a_call_that_failed_holds_nothing_while_others_are_tried() -> None:
    """Its error holds its frames, and they their tensors: what is left would not tell what fits."""
    held: list[weakref.ref[Tensor]] = []

    class HoldingDetector(ColourDetector):
        def detect(self, batch: Tensor, query_embeddings: Tensor) -> tuple[Tensor, Tensor]:
            assert not any(reference() is not None for reference in held), "memory of an earlier call"
            activations = batch.clone()
            if len(batch) > 2:
                held.append(weakref.ref(activations))
                raise torch.OutOfMemoryError
            return super().detect(batch, query_embeddings)

    with engine(HoldingDetector(), BoxSegmenter()) as one, pytest.raises(PreflightError, match="detector_batch=2"):
        one.annotate(IMAGES)
    assert len(held) > 3


def test_later_callers_hear_of_it_too() -> None:
    with engine(ShortDetector(lambda batch: True), BoxSegmenter()) as one:
        for _ in range(2):
            with pytest.raises(PreflightError, match="detector_batch"):
                one.annotate(IMAGES)


def test_what_never_fits_is_told() -> None:
    with (
        engine(ShortDetector(lambda batch: True), BoxSegmenter()) as one,
        pytest.raises(PreflightError, match=r"at any resources\.detector_batch "),
    ):
        one.annotate(IMAGES)
