"""The engine with plain stand-in models: batching, order, failures, several callers. No weights, no Ray."""

import io
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from owlsam_ray.config.inference import DecodeConfig, DetectorConfig, SegmentConfig, SuppressConfig, TilingConfig
from owlsam_ray.errors import FailureClass
from owlsam_ray.inference.engine import Engine
from owlsam_ray.inference.work_items import STAGES, EngineSettings
from owlsam_ray.models.protocols import Detector
from owlsam_ray.records import EncodedImage, Prediction


class ColourDetector:
    """One box per image; its score is the mean of the picture, its width too."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def preprocess(self, pixels: NDArray[np.uint8]) -> Tensor:
        return torch.full((3, 2, 2), float(pixels.mean()) / 255)

    def detect(self, batch: Tensor, query_embeddings: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append(tuple(batch.shape))
        value = batch.mean(dim=(1, 2, 3))
        half = torch.full_like(value, 0.5)
        return torch.stack([half, half, value, half], 1)[:, None], value[:, None, None].expand(
            -1, 1, len(query_embeddings)
        )

    def unscale(self, boxes_cxcywh: Tensor, size_hw: tuple[int, int]) -> Tensor:
        cx, cy, w, h = boxes_cxcywh.unbind(-1)
        height, width = size_hw
        return torch.stack(
            [(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height], -1
        )


class BoxSegmenter:
    """The mask of a box is everything, with the picture's mean as predicted IoU."""

    device = torch.device("cpu")
    image_size = 32

    def __init__(self) -> None:
        self.encoder_calls: list[tuple[int, ...]] = []
        self.decoder_calls: list[int] = []

    def preprocess(self, pixels: NDArray[np.uint8]) -> Tensor:
        return torch.full((3, 32, 32), float(pixels.mean()) / 255)

    def encode(self, batch: Tensor) -> Tensor:
        self.encoder_calls.append(tuple(batch.shape))
        return batch[:, :1, :2, :2]

    def decode(
        self,
        embeddings: Tensor,
        image_index: Tensor,
        boxes_xyxy: Tensor,
        *,
        multimask: bool,
        center_point: bool = False,
    ) -> tuple[Tensor, Tensor]:
        self.decoder_calls.append(len(boxes_xyxy))
        return torch.ones(len(boxes_xyxy), 1, 8, 8), embeddings.mean(dim=(1, 2, 3))[image_index][:, None]


def encoded(image_id: int, grey: int, size: tuple[int, int] = (20, 10)) -> EncodedImage:
    buffer = io.BytesIO()
    Image.new("RGB", size, (grey,) * 3).save(buffer, "PNG")
    return EncodedImage(image_id, buffer.getvalue())


def make_engine(
    detector: Detector,
    segmenter: BoxSegmenter,
    *,
    prompts: int = 1,
    floor: float = 0.1,
    tiling: TilingConfig | None = None,
    suppress: SuppressConfig | None = None,
) -> Engine:
    return Engine(
        detector,
        segmenter,
        query_embeddings=torch.zeros(prompts, 4),
        query_labels=range(prompts),
        settings=EngineSettings(
            decode=DecodeConfig(),
            detector=DetectorConfig(weights="unused", score_floor=floor),
            tiling=tiling or TilingConfig(),
            suppress=suppress or SuppressConfig(),
            segment=SegmentConfig(weights="unused", score_floor=0.2),
            detector_batch=4,
            segmenter_batch=3,
            decoder_batch=5,
            threads=2,
        ),
    )


def test_one_row_per_image_in_order_with_padded_batches() -> None:
    detector, segmenter = ColourDetector(), BoxSegmenter()
    with make_engine(detector, segmenter) as engine:
        rows, seconds = engine.annotate([encoded(i, 100 + i) for i in range(10)])
    assert [row.image_id for row in rows] == list(range(10))
    assert {row.status for row in rows} == {"ok"}
    assert [float(row.detections.scores[0]) for row in rows] == pytest.approx([(100 + i) / 255 for i in range(10)])
    assert [row.segments[0].predicted_iou for row in rows if row.segments[0]] == pytest.approx(
        [(100 + i) / 255 for i in range(10)]
    )
    assert rows[0].segments[0] is not None
    assert rows[0].segments[0].area == 200
    assert set(detector.calls) == {(4, 3, 2, 2)}  # 10 images: two full batches and a padded one
    assert len(detector.calls) == 3
    assert set(segmenter.encoder_calls) == {(3, 3, 32, 32)}
    assert set(segmenter.decoder_calls) == {5}
    assert set(seconds) == set(STAGES)
    assert all(value > 0 for value in seconds.values())


def test_every_kind_of_row() -> None:
    detector, segmenter = ColourDetector(), BoxSegmenter()
    images = [
        encoded(1, 0),  # under the score floor
        encoded(2, 40),  # above it, under the mask floor
        EncodedImage(3, b"\xff\xd8not a picture"),
        EncodedImage(4, None, failure=("fetch_failed: timeout", FailureClass.TRANSIENT)),
        encoded(5, 200),
        EncodedImage(6, None),
    ]
    with make_engine(detector, segmenter) as engine:
        rows, _ = engine.annotate(images)
    assert [row.status for row in rows] == ["empty", "ok", "failed", "failed", "ok", "failed"]
    assert rows[1].segments == (None,)
    assert rows[3].failure == ("fetch_failed: timeout", FailureClass.TRANSIENT)
    assert rows[4].segments[0] is not None
    assert rows[5].failure == ("empty_file", FailureClass.PERMANENT)


def test_no_images_no_rows() -> None:
    with make_engine(ColourDetector(), BoxSegmenter()) as engine:
        assert engine.annotate([])[0] == []


def test_callers_share_batches_across_shard_borders() -> None:
    detector, segmenter = ColourDetector(), BoxSegmenter()
    barrier = threading.Barrier(2)

    def shard(engine: Engine, first: int) -> Sequence[Prediction]:
        barrier.wait()
        return engine.annotate([encoded(i, 100 + i % 100) for i in range(first, first + 34)])[0]

    with make_engine(detector, segmenter) as engine, ThreadPoolExecutor(2) as pool:
        one, other = (pool.submit(shard, engine, first) for first in (0, 1000))
        assert [row.image_id for row in one.result()] == list(range(34))
        assert [row.image_id for row in other.result()] == list(range(1000, 1034))
    # 68 images fill 17 calls; two shards of their own would take 18, both with a padded last one.
    assert len(detector.calls) == 17


def test_nan_from_the_model_fails_the_image_alone() -> None:
    class NanDetector(ColourDetector):
        def detect(self, batch: Tensor, query_embeddings: Tensor) -> tuple[Tensor, Tensor]:
            boxes, scores = super().detect(batch, query_embeddings)
            return boxes, torch.where(scores > 0.7, torch.nan, scores)

    with make_engine(NanDetector(), BoxSegmenter()) as engine:
        rows, _ = engine.annotate([encoded(1, 100), encoded(2, 250), encoded(3, 120)])
    assert [row.status for row in rows] == ["ok", "failed", "ok"]
    assert rows[1].failure is not None
    assert rows[1].failure[0].startswith("non_finite")


@pytest.mark.parametrize("where", ["preprocess", "detect", "encode"])
def test_a_broken_model_reaches_every_caller(where: str) -> None:
    def broken(*arguments: object, **named: object) -> Tensor:
        time.sleep(0.05)
        raise ZeroDivisionError("the model broke")

    detector, segmenter = ColourDetector(), BoxSegmenter()
    setattr(segmenter if where == "encode" else detector, where, broken)
    engine = make_engine(detector, segmenter)
    with ThreadPoolExecutor(2) as pool:
        # More images than permits, so that a caller is waiting for one when the model breaks.
        shards = [pool.submit(engine.annotate, [encoded(i, 99) for i in range(40)]) for _ in range(2)]
        for shard in shards:
            with pytest.raises(RuntimeError, match="the model broke"):
                shard.result(timeout=20)
    engine.close()
    with pytest.raises(RuntimeError):
        engine.annotate([encoded(1, 99)])


def test_query_labels_must_match_queries() -> None:
    with pytest.raises(ValueError, match="2 query labels for 1"):
        Engine(
            ColourDetector(),
            BoxSegmenter(),
            query_embeddings=torch.zeros(1, 4),
            query_labels=[0, 1],
            settings=make_engine(ColourDetector(), BoxSegmenter())._settings,
        )


class SquareDetector(ColourDetector):
    """Finds the white square of a view: its box, and its share of the view as the score; a last 1 marks a real view."""

    def preprocess(self, pixels: NDArray[np.uint8]) -> Tensor:
        rows, columns = (np.flatnonzero((pixels[..., 0] > 128).any(axis=axis)) for axis in (1, 0))
        if len(rows) == 0:
            return torch.tensor([[[0.0, 0.0, 0.0, 0.0, 0.0, 1.0]]])
        height, width = pixels.shape[:2]
        x0, x1, y0, y1 = columns[0] / width, (columns[-1] + 1) / width, rows[0] / height, (rows[-1] + 1) / height
        return torch.tensor([[[(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0, 0.2 + (x1 - x0) * (y1 - y0), 1]]])

    def detect(self, batch: Tensor, query_embeddings: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append(tuple(batch.shape))
        return batch[:, 0, :, :4].float(), batch[:, 0, :, 4:5].float().expand(-1, -1, len(query_embeddings))


def with_square(image_id: int, x: int, y: int, side: int = 8) -> EncodedImage:
    picture = Image.new("RGB", (300, 200))
    picture.paste((255, 255, 255), (x, y, x + side, y + side))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return EncodedImage(image_id, buffer.getvalue())


def test_tiles_see_small_objects_at_their_own_size_and_merge_into_one_box() -> None:
    """25 views of each image share batches, and cut squares vanish in the whole ones."""
    places = [(3, 5), (100, 40), (290, 190), (60, 61), (155, 100)]
    tiling = TilingConfig(size=64, overlap=0.25)
    suppress = SuppressConfig(overlap="ios", threshold=0.9)
    detector = SquareDetector()
    images = [with_square(number, x, y) for number, (x, y) in enumerate(places)]
    with make_engine(detector, BoxSegmenter(), floor=0.05, tiling=tiling, suppress=suppress) as engine:
        rows, _ = engine.annotate(images)
    for row, (x, y) in zip(rows, places, strict=True):
        assert row.detections.boxes_xyxy == pytest.approx(np.array([[x, y, x + 8, y + 8]]), abs=1e-3)
        # Seen in a tile, where it is larger than in the whole picture.
        assert float(row.detections.scores[0]) == pytest.approx(0.2 + 64 / 64**2, abs=1e-6)
    views = 1 + 6 * 4
    assert len(detector.calls) == -(-len(places) * views // 4)
    assert {call[0] for call in detector.calls} == {4}


def test_a_picture_of_many_tiles_passes_with_few_views_in_memory() -> None:
    """A hundred times more tiles than permits, several pictures at once, and threads that also encode."""
    alive, most = 0, 0
    lock = threading.Lock()

    class CountingDetector(SquareDetector):
        def preprocess(self, pixels: NDArray[np.uint8]) -> Tensor:
            nonlocal alive, most
            with lock:
                alive += 1
                most = max(most, alive)
            return super().preprocess(pixels)

        def detect(self, batch: Tensor, query_embeddings: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal alive
            with lock:
                alive -= int(batch[:, 0, 0, 5].sum())
            return super().detect(batch, query_embeddings)

    tiling = TilingConfig(size=32, overlap=0.5)
    with make_engine(CountingDetector(), BoxSegmenter(), tiling=tiling) as engine:
        rows, _ = engine.annotate([with_square(number, 20 * number, 30) for number in range(12)])
    assert {row.status for row in rows} == {"ok"}
    assert most <= 2 * 4 + 2 + 4 + 2  # permits, and the batch in the model's hands


def test_a_bad_tile_fails_its_image_alone() -> None:
    class NanDetector(SquareDetector):
        def detect(self, batch: Tensor, query_embeddings: Tensor) -> tuple[Tensor, Tensor]:
            boxes, scores = super().detect(batch, query_embeddings)
            return boxes, torch.where(scores > 0.21, torch.nan, scores)

    with make_engine(NanDetector(), BoxSegmenter(), tiling=TilingConfig(size=64)) as engine:
        rows, _ = engine.annotate([with_square(1, 0, 0, side=2), with_square(2, 50, 50, side=20)])
    assert [row.status for row in rows] == ["ok", "failed"]


def test_a_process_ends_without_closing_the_engine() -> None:
    """As Ray's actors do: a thread that is waited for would keep the process, and its memory, for ever."""
    code = "from tests.inference.test_engine import *; engine = make_engine(ColourDetector(), BoxSegmenter()); "
    code += "print(len(engine.annotate([encoded(1, 99)])[0]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "1\n"
