"""Pictures to squares: against transformers' processors, and against plain loops in float64."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import Owlv2ImageProcessor, OwlViTImageProcessor

from owlsam_ray.config.inference import DetectorConfig
from owlsam_ray.errors import WeightsError
from owlsam_ray.models.owl_preprocess import Scenic, hf_preprocessing, load_processor, make_preprocessing
from tests.seeded_owlvit import TINY_SIDE, write_tiny

MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
SIZES = [(48, 64), (64, 48), (64, 64), (7, 5), (5, 3), (2, 1), (1, 40), (130, 97), (97, 31), (200, 300)]
SIDES = [40, 64, 97]


def noise(height: int, width: int) -> NDArray[np.uint8]:
    """The worst case: neighbours have nothing in common."""
    return np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)


def compare_owlv2(height: int, width: int, side: int) -> tuple[float, float]:
    """Seconds of the processor and of ours, which differ by at most 1e-5."""
    processor = Owlv2ImageProcessor(size={"height": side, "width": side})
    ours = hf_preprocessing(processor, side)
    picture = noise(height, width)
    start = perf_counter()
    expected = processor(images=[picture], input_data_format="channels_last", return_tensors="pt")["pixel_values"][0]
    middle = perf_counter()
    found = ours(picture)
    end = perf_counter()
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    return middle - start, end - middle


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_owlv2_equals_the_processor(height: int, width: int, side: int) -> None:
    compare_owlv2(height, width, side)


@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 427), (960, 960), (961, 500)])
def test_owlv2_equals_the_processor_at_full_size(height: int, width: int) -> None:
    compare_owlv2(height, width, 960)


def test_owlv2_of_a_large_picture_is_much_faster_than_the_processor() -> None:
    compare_owlv2(480, 640, 960)  # what is done once
    theirs, ours = compare_owlv2(2000, 3000, 960)
    print(f"processor {theirs:.3f} s, ours {ours:.3f} s")
    assert ours < 0.5 * theirs  # 30 times when nothing else runs


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("resample", [2, 3])
def test_owlvit_gives_the_bits_of_the_processor(height: int, width: int, side: int, resample: int) -> None:
    processor = OwlViTImageProcessor(size={"height": side, "width": side}, resample=resample, do_center_crop=False)
    picture = noise(height, width)
    expected = processor(images=[picture], input_data_format="channels_last", return_tensors="pt")["pixel_values"][0]
    assert torch.equal(hf_preprocessing(processor, side)(picture), expected)


def plain_scenic(picture: NDArray[np.uint8], side: int, pad_value: float) -> NDArray[np.float64]:
    """Every pixel of the square by itself."""
    height, width, _ = picture.shape
    ratio = max(np.float32(height) / np.float32(side), np.float32(width) / np.float32(side))
    fit_h, fit_w = (int(min(np.float32(size) / ratio, np.float32(side))) for size in (height, width))
    values = picture.astype(np.float64) / 255
    square = np.full((side, side, 3), pad_value)
    for row in range(fit_h):
        y = max((row + 0.5) * height / fit_h - 0.5, 0.0)
        top, bottom, down = int(y), min(int(y) + 1, height - 1), y - int(y)
        for column in range(fit_w):
            x = max((column + 0.5) * width / fit_w - 0.5, 0.0)
            left, right, along = int(x), min(int(x) + 1, width - 1), x - int(x)
            above = (1 - along) * values[top, left] + along * values[top, right]
            below = (1 - along) * values[bottom, left] + along * values[bottom, right]
            square[row, column] = (1 - down) * above + down * below
    return (square - MEAN) / STD


@pytest.mark.parametrize("pad_value", [0.0, 0.5])
@pytest.mark.parametrize("side", SIDES[:2])
@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 48), (64, 64), (5, 3), (97, 31), (200, 300)])
def test_scenic_equals_a_plain_loop(height: int, width: int, side: int, pad_value: float) -> None:
    processor = Owlv2ImageProcessor(size={"height": 32, "width": 32})
    found = Scenic(processor, side, pad_value)(noise(height, width))
    expected = plain_scenic(noise(height, width), side, pad_value).transpose(2, 0, 1)
    assert found.dtype == torch.float32
    # Places are float32: 1e-5 of a pixel, between neighbours that differ by up to 4 after normalisation.
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-4)


def test_scenic_cuts_fitting_sides_as_float32_does() -> None:
    scenic = Scenic(Owlv2ImageProcessor(), 960, 0.0)
    assert scenic.fit_hw((480, 640)) == (720, 960)
    assert scenic.fit_hw((130, 100)) == (959, 738)
    assert scenic.fit_hw((1, 5000)) == (1, 960)
    assert scenic(noise(1, 5000)).shape == (3, 960, 960)


def test_frames() -> None:
    squashed, padded = (hf_preprocessing(kind(), 64) for kind in (OwlViTImageProcessor, Owlv2ImageProcessor))
    scenic = Scenic(OwlViTImageProcessor(), 64, 0.0)
    assert squashed.frame_hw((30, 50)) == (30, 50)
    assert padded.frame_hw((30, 50)) == scenic.frame_hw((30, 50)) == (50, 50)


def test_many_threads_get_the_same_bits() -> None:
    preprocessing = hf_preprocessing(Owlv2ImageProcessor(), 96)
    pictures = [noise(height, width) for height, width in SIZES]
    alone = [preprocessing(picture) for picture in pictures]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(preprocessing, pictures * 10))
    assert all(torch.equal(value, alone[index % len(alone)]) for index, value in enumerate(together))


def test_wide_pictures_are_taken_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    preprocessing, picture = hf_preprocessing(Owlv2ImageProcessor(), 64), noise(30, 100)
    whole = preprocessing(picture)
    monkeypatch.setattr("owlsam_ray.models.owl_preprocess._COLUMNS_PER_STEP", 7)
    assert torch.equal(preprocessing(picture), whole)


# Files


def test_scenic_is_the_same_for_both_families(tmp_path: Path) -> None:
    squares = []
    for model in ("owlvit", "owlv2"):
        write_tiny(tmp_path / model, family=model)
        settings = DetectorConfig(model=model, weights="-", preprocess="scenic", pad_value=0.25)
        squares.append(make_preprocessing(tmp_path / model, settings)(noise(40, 60)))
    assert torch.equal(*squares)
    grey = torch.from_numpy((0.25 - MEAN) / STD).float()
    assert squares[0].shape == (3, TINY_SIDE, TINY_SIDE)
    torch.testing.assert_close(squares[0][:, 64:], grey[:, None, None].expand(3, 32, TINY_SIDE))


def test_the_models_size_counts_not_the_processors(tmp_path: Path) -> None:
    write_tiny(tmp_path, family="owlv2")
    rewrite(tmp_path, size={"height": 640, "width": 640})
    assert make_preprocessing(tmp_path, DetectorConfig(model="owlv2", weights="-")).side == TINY_SIDE


def rewrite(directory: Path, **fields: object) -> None:
    file = directory / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_centre_crop_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    rewrite(tmp_path, do_center_crop=True)
    with pytest.raises(WeightsError, match="would cut objects off"):
        load_processor(tmp_path)


@pytest.mark.parametrize("name", ["do_pad", "do_resize", "do_rescale", "do_normalize"])
def test_an_owlv2_without_one_of_its_steps_is_refused(tmp_path: Path, name: str) -> None:
    write_tiny(tmp_path, family="owlv2")
    rewrite(tmp_path, **{name: False})
    with pytest.raises(WeightsError, match=f"sets {name} to false"):
        load_processor(tmp_path)


def test_damaged_processor_files_are_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("[1]")
    with pytest.raises(WeightsError, match="does not describe an image processor"):
        load_processor(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(WeightsError, match=r"holds no preprocessor_config\.json or processor_config\.json"):
        load_processor(tmp_path)
