"""Decoded masks to one record per image: cleaned, shared, dropped when small."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from owlsam_ray.config.inference import SegmentConfig
from owlsam_ray.errors import ImageError
from owlsam_ray.inference import encode
from owlsam_ray.inference.encode import encode_prediction
from owlsam_ray.inference.segment import DecodedMasks
from owlsam_ray.models.sam_frame import input_size_hw
from owlsam_ray.ops import masks
from owlsam_ray.ops.masks import decode_rle
from owlsam_ray.records import Detections, Prediction
from tests.oracles import clean_mask_loop, masks_whole_tensor, stability_loop, tight_box_loop

SIZE, SIDE = (40, 56), 64
INPUT = input_size_hw(SIZE, SIDE)


def detections(count: int) -> Detections:
    numbers = np.arange(count)
    return Detections(
        boxes_xyxy=np.tile(numbers[:, None], 4).astype(np.float32),
        scores=np.linspace(0.9, 0.1, count, dtype=np.float32),
        raw_scores=np.linspace(0.9, 0.1, count, dtype=np.float32),
        labels=numbers + 100,
        prompt_ids=numbers + 200,
        num_merged=numbers + 1,
    )


def rough_logits(count: int, seed: int) -> Tensor:
    """Blobs with noise on them: masks with holes and islands."""
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    coarse = 3 * torch.randn(count, 1, 4, 4, generator=generator)
    blobs = torch.nn.functional.interpolate(coarse, (16, 16), mode="bilinear")[:, 0]
    return blobs + 1.5 * torch.randn(count, 16, 16, generator=generator)


def run(found: Detections, masked: list[int], decoded: DecodedMasks | None, **settings: Any) -> Prediction:
    return encode_prediction(
        7,
        SIZE,
        found,
        masked=np.array(masked, np.int64),
        decoded=decoded,
        image_size=SIDE,
        settings=SegmentConfig(weights="w", **settings),
        note="a note",
    )


def decoded_masks(logits: Tensor, index: list[int]) -> DecodedMasks:
    return DecodedMasks(logits, torch.linspace(0.2, 0.8, len(logits)), np.array(index, np.int64))


@pytest.mark.parametrize(
    "settings", [{}, {"fill_holes": 30}, {"remove_islands": 30}, {"fill_holes": 9, "remove_islands": 90}]
)
def test_masks_are_cleaned_before_they_are_measured(settings: dict[str, int]) -> None:
    logits = rough_logits(4, seed=1)
    prediction = run(detections(4), [0, 1, 2, 3], decoded_masks(logits, [2, 0, 1, 3]), **settings)
    assert (prediction.image_id, prediction.size_hw, prediction.note) == (7, SIZE, "a note")
    raw = masks_whole_tensor(logits, size_hw=SIZE, input_hw=INPUT, image_size=SIDE)
    stability = stability_loop(logits, input_hw=INPUT, image_size=SIDE)
    changed = 0
    for segment, row in zip(prediction.segments, [2, 0, 1, 3], strict=True):
        assert segment is not None
        expected = clean_mask_loop(
            raw[row], fill_holes=settings.get("fill_holes", 0), remove_islands=settings.get("remove_islands", 0)
        )
        changed += int((expected != raw[row]).any())
        np.testing.assert_array_equal(decode_rle(segment.rle_counts, SIZE), expected)
        assert segment.area == expected.sum()
        assert segment.box_xyxy == tight_box_loop(expected)
        assert segment.predicted_iou == pytest.approx(float(torch.linspace(0.2, 0.8, 4)[row]))
        assert segment.stability == pytest.approx(stability[row], abs=1e-7)
    assert changed >= 3 if settings else changed == 0


def test_detections_on_one_box_share_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five detections, of which three have a mask and two of these the same: two masks are made."""
    made: list[NDArray[np.float32]] = []
    original = masks.segments_from_logits

    def count(low_res: Tensor, *args: Any, **kwargs: Any) -> Any:
        made.extend(low_res)
        return original(low_res, *args, **kwargs)

    monkeypatch.setattr(encode, "segments_from_logits", count)
    prediction = run(detections(5), [0, 2, 3], decoded_masks(rough_logits(2, seed=2), [1, 0, 1]))
    first, second, third, fourth, fifth = prediction.segments
    assert len(made) == 2
    assert first is not None
    assert first is fourth
    assert third is not None
    assert third != first
    assert (second, fifth) == (None, None)


def test_small_masks_drop_their_detections() -> None:
    logits = torch.full((3, 16, 16), -4.0)
    logits[0, 2:9, 3:12] = 4.0
    logits[1, 5, 5] = 4.0
    found = detections(6)
    decoded = decoded_masks(logits, [1, 0, 2, 1])  # small, large, empty, small
    areas = [segment.area for segment in run(found, [0, 1, 3, 4], decoded).segments if segment is not None]
    small, large, none, again = areas
    assert (none, again) == (0, small)
    assert 0 < small < large
    for min_area, kept in ((0, 6), (1, 5), (small, 5), (small + 1, 3), (large, 3), (large + 1, 2)):
        prediction = run(found, [0, 1, 3, 4], decoded, min_area=min_area)
        stays = [2, 5]  # without mask
        stays += [1] if min_area <= large else []
        stays += [0, 4] if min_area <= small else []
        stays += [3] if min_area == 0 else []
        stays.sort()
        assert len(prediction.detections) == kept
        assert prediction.detections.labels.tolist() == [100 + place for place in stays]
        assert prediction.detections.num_merged.tolist() == [1 + place for place in stays]
        assert [segment is None for segment in prediction.segments] == [place in (2, 5) for place in stays]
        assert prediction.status == "ok"


def test_an_image_whose_masks_are_all_small_is_empty() -> None:
    prediction = run(detections(2), [0, 1], decoded_masks(torch.full((2, 16, 16), -1.0), [0, 1]), min_area=1)
    assert (prediction.status, prediction.segments, len(prediction.detections)) == ("empty", (), 0)


def test_islands_go_before_the_area_counts() -> None:
    """A large dot and two small ones: without the small ones the mask is too small."""
    logits = torch.full((1, 16, 16), -4.0)
    for y, x, side in ((1, 1, 3), (8, 2, 1), (8, 8, 1)):
        logits[0, y : y + side, x : x + side] = 4.0
    whole = run(detections(1), [0], decoded_masks(logits, [0])).segments[0]
    alone = run(detections(1), [0], decoded_masks(logits, [0]), remove_islands=60).segments[0]
    assert whole is not None
    assert alone is not None
    assert alone.area < whole.area
    assert run(detections(1), [0], decoded_masks(logits, [0]), min_area=whole.area).status == "ok"
    emptied = run(detections(1), [0], decoded_masks(logits, [0]), min_area=whole.area, remove_islands=60)
    assert emptied.status == "empty"


@pytest.mark.parametrize("decoded", [None, DecodedMasks(torch.zeros(0, 1, 1), torch.zeros(0), np.zeros(0, np.int64))])
def test_no_masks(decoded: DecodedMasks | None) -> None:
    prediction = run(detections(3), [], decoded, min_area=50)
    assert (prediction.segments, prediction.status) == ((None, None, None), "ok")
    assert run(Detections.empty(), [], decoded).status == "empty"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["logits", "predicted_iou"])
def test_values_that_are_no_numbers_fail_the_image(where: str, value: float) -> None:
    decoded = decoded_masks(rough_logits(2, seed=3), [0, 1])
    getattr(decoded, where).view(-1)[3 if where == "logits" else 1] = value
    with pytest.raises(ImageError, match="non_finite") as caught:
        run(detections(2), [0, 1], decoded)
    assert caught.value.reason.startswith("non_finite")
