"""SAM against transformers' own `SamModel` and `SamProcessor`, and what its loader refuses."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import SamModel

from owlsam_ray.errors import WeightsError
from owlsam_ray.masks import decode_rle, segments_from_logits
from owlsam_ray.models.sam import Sam, check_weights
from owlsam_ray.models.sam_frame import boxes_to_sam_frame, input_size_hw
from owlsam_ray.settings import SegmentConfig
from owlsam_ray.stages.segment import decode_boxes
from tests.seeded_sam import TINY_SIDE, processor, write_full, write_tiny

CPU = torch.device("cpu")
Pixels = NDArray[np.uint8]


def load(path: Path, dtype: torch.dtype = torch.float32) -> Sam:
    return Sam.load(path, device=CPU, dtype=dtype)


@dataclass
class Both:
    """One picture through our code and through transformers', the encoders once."""

    ours: Sam
    theirs: SamModel
    pixels: Pixels
    boxes: NDArray[np.float32]

    def __post_init__(self) -> None:
        self.size_hw = (self.pixels.shape[0], self.pixels.shape[1])
        self.processor = processor(self.ours.image_size)
        self.inputs = self.ours.preprocess(self.pixels)[None]
        self.expected_inputs = self._process()["pixel_values"]
        self.embedding = self.ours.encode(self.inputs)
        with torch.inference_mode():
            self.expected_embedding = self.theirs.get_image_embeddings(self.expected_inputs)

    def _process(self, **prompts: Any) -> Any:
        return self.processor(Image.fromarray(self.pixels), return_tensors="pt", **prompts)

    def decode(self, *, multimask: bool, center_point: bool) -> tuple[Tensor, Tensor]:
        in_frame = boxes_to_sam_frame(self.boxes, size_hw=self.size_hw, image_size=self.ours.image_size)
        owner = torch.zeros(len(self.boxes), dtype=torch.int64)
        return self.ours.decode(
            self.embedding, owner, torch.from_numpy(in_frame), multimask=multimask, center_point=center_point
        )

    def expect(self, *, multimask: bool, center_point: bool) -> tuple[Tensor, Tensor, NDArray[np.bool_]]:
        """Logits (M, K, m, m), predicted IoU (M, K) and masks (M, K, H, W) as transformers documents it."""
        prompts: dict[str, Any] = {"input_boxes": [self.boxes.tolist()]}
        if center_point:
            centres = (self.boxes[:, :2] + self.boxes[:, 2:]) / 2
            prompts |= {"input_points": [centres[:, None].tolist()], "input_labels": [[[1]] * len(self.boxes)]}
        inputs = self._process(**prompts)
        given = {name: inputs[name] for name in ("input_boxes", "input_points", "input_labels") if name in inputs}
        given = {name: value.float() if name != "input_labels" else value for name, value in given.items()}
        with torch.inference_mode():
            outputs = self.theirs(image_embeddings=self.expected_embedding, multimask_output=multimask, **given)
        masks = self.processor.post_process_masks(
            outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
        )
        return outputs.pred_masks[0], outputs.iou_scores[0], masks[0].numpy()

    def masks(self, by: str, prompt: str) -> NDArray[np.bool_]:
        """(M, H, W) through the stages of a run."""
        settings = SegmentConfig.model_validate({"weights": "w", "masks": by, "prompt": prompt})
        input_hw = input_size_hw(self.size_hw, self.ours.image_size)
        in_frame = boxes_to_sam_frame(self.boxes, size_hw=self.size_hw, image_size=self.ours.image_size)
        (decoded,) = decode_boxes(
            self.ours, self.embedding, [in_frame], input_sizes_hw=[input_hw], batch_size=4, settings=settings
        )
        segments = segments_from_logits(
            decoded.logits,
            decoded.predicted_iou,
            size_hw=self.size_hw,
            input_hw=input_hw,
            image_size=self.ours.image_size,
        )
        return np.stack([decode_rle(segments[index].rle_counts, self.size_hw) for index in decoded.index.tolist()])


def boxes_of(pixels: Pixels) -> NDArray[np.float32]:
    """All of it, its middle, an upper left and a lower right part, with fractions of pixels."""
    height, width = pixels.shape[:2]
    parts = np.array([[0, 0, 1, 1], [0.25, 0.3, 0.7, 0.8], [0.02, 0.05, 0.4, 0.5], [0.5, 0.45, 0.98, 0.93]], np.float32)
    return parts * np.array([width, height, width, height], np.float32)


def compare(both: Both) -> None:
    assert both.inputs.shape == both.expected_inputs.shape
    np.testing.assert_allclose(both.inputs.numpy(), both.expected_inputs.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(both.embedding.numpy(), both.expected_embedding.numpy(), rtol=0, atol=1e-4)
    for multimask in (False, True):
        for center_point in (False, True):
            kind = {"multimask": multimask, "center_point": center_point}
            logits, quality = both.decode(**kind)
            expected_logits, expected_quality, expected_masks = both.expect(**kind)
            assert logits.shape == expected_logits.shape
            print(kind, "logits", float((logits - expected_logits).abs().max()))
            np.testing.assert_allclose(logits.numpy(), expected_logits.numpy(), rtol=0, atol=5e-4)
            np.testing.assert_allclose(quality.numpy(), expected_quality.numpy(), rtol=0, atol=1e-4)
            best = expected_quality.argmax(dim=1).numpy()
            ours = both.masks("best_of_three" if multimask else "single", "box_and_center" if center_point else "box")
            for row, mask in enumerate(ours):
                expected = expected_masks[row, best[row]]
                union = (mask | expected).sum()
                assert union == 0 or (mask & expected).sum() / union >= 0.999


# Full size


@pytest.fixture(scope="module")
def full(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sam, SamModel]:
    directory = tmp_path_factory.mktemp("sam")
    write_full(directory, shared)
    return load(directory), SamModel.from_pretrained(directory).eval()


@pytest.mark.parametrize(
    "picture",
    ["landscape", pytest.param("portrait", marks=pytest.mark.slow), pytest.param("tiny", marks=pytest.mark.slow)],
)
def test_vit_b_equals_transformers(full: tuple[Sam, SamModel], shared: Path, picture: str) -> None:
    name = "000000000872" if picture == "portrait" else "000000000208"
    image = Image.open(shared / "data" / "coco_mini" / "images" / f"{name}.jpg").convert("RGB")
    if picture == "tiny":
        image = image.resize((40, 30))
    pixels = np.array(image)
    assert (pixels.shape[0] > pixels.shape[1]) == (picture == "portrait")
    both = Both(*full, pixels, boxes_of(pixels))
    compare(both)
    shares = both.masks("single", "box").mean(axis=(1, 2))
    print(f"shares of the picture {shares}")
    assert ((shares > 0.001) & (shares < 0.999)).any()  # neither all empty nor all full


# Tiny


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny(directory, seed=1)
    return directory


@pytest.fixture(scope="module")
def tiny(tiny_directory: Path) -> Sam:
    return load(tiny_directory)


def drawn(seed: int, height: int, width: int) -> Pixels:
    """A picture with soft blobs and some noise."""
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 7, 3), np.uint8)).resize((width, height))
    return np.clip(np.array(coarse) + random.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("size_hw", [(90, 140), (200, 61), (128, 128), (7, 9), (3, 300)])
def test_tiny_equals_transformers(tiny_directory: Path, tiny: Sam, size_hw: tuple[int, int]) -> None:
    theirs = SamModel.from_pretrained(tiny_directory).eval()
    pixels = drawn(sum(size_hw), *size_hw)
    compare(Both(tiny, theirs, pixels, boxes_of(pixels)))


def test_tiny_masks_are_worth_comparing(tiny_directory: Path, tiny: Sam) -> None:
    pixels = drawn(4, 96, 128)
    both = Both(tiny, SamModel.from_pretrained(tiny_directory).eval(), pixels, boxes_of(pixels))
    masks = both.masks("single", "box")
    assert len({mask.tobytes() for mask in masks}) == 4
    assert any(0.02 < mask.mean() < 0.98 for mask in masks)


def test_same_bits_whatever_the_batch_mates(tiny: Sam) -> None:
    batch = torch.stack([tiny.preprocess(drawn(seed, 80, 100)) for seed in range(4)])
    whole, order = tiny.encode(batch), [2, 0, 3, 1]
    assert torch.equal(tiny.encode(batch[order]), whole[order])
    alone = tiny.encode(torch.cat([batch[1:2], torch.zeros_like(batch[1:])]))
    assert torch.equal(alone[0], whole[1])


def test_bf16_is_close(tiny_directory: Path, tiny: Sam) -> None:
    inputs = tiny.preprocess(drawn(5, 80, 100))[None]
    exact, rounded = tiny.encode(inputs), load(tiny_directory, torch.bfloat16).encode(inputs)
    assert rounded.dtype == torch.float32
    difference = float((exact - rounded).abs().mean() / exact.abs().mean())
    print(f"mean relative difference {difference:.4f}")
    assert 0 < difference < 0.05  # a few roundings of 2^-9 in each of two layers


def test_no_box_no_mask(tiny: Sam) -> None:
    embedding = tiny.encode(torch.zeros(1, 3, TINY_SIDE, TINY_SIDE))
    none = torch.zeros(0, dtype=torch.int64)
    for multimask, count in ((False, 1), (True, 3)):
        logits, quality = tiny.decode(embedding, none, torch.zeros(0, 4), multimask=multimask)
        assert (logits.shape, quality.shape) == ((0, count, TINY_SIDE // 4, TINY_SIDE // 4), (0, count))


# Loading


@pytest.fixture
def copy(tiny_directory: Path, tmp_path: Path) -> Path:
    for file in tiny_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_other_tensors_are_named(copy: Path) -> None:
    state = load_file(copy / "model.safetensors")
    state["stranger"] = torch.zeros(2)
    state["vision_encoder.neck.conv1.weight"] = torch.zeros(7)
    del state["mask_decoder.iou_token.weight"]
    save_file(state, copy / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        check_weights(copy)
    for words in ("1 missing: mask_decoder.iou_token.weight", "1 unexpected: stranger (2,)", "neck.conv1.weight (7,)"):
        assert words in str(caught.value)


@pytest.mark.parametrize("names", [("own",), ("own", "tied"), ("tied",)])
def test_the_frequencies_may_stand_under_either_name(copy: Path, tiny: Sam, names: tuple[str, ...]) -> None:
    state = load_file(copy / "model.safetensors")
    places = {
        "own": "shared_image_embedding.positional_embedding",
        "tied": "prompt_encoder.shared_embedding.positional_embedding",
    }
    frequencies = state.pop(places["own"])
    save_file(state | {places[name]: frequencies.clone() for name in names}, copy / "model.safetensors")
    inputs = tiny.preprocess(drawn(6, 50, 60))[None]
    boxes, owner = torch.tensor([[3.0, 4, 50, 60]]), torch.zeros(1, dtype=torch.int64)
    expected = tiny.decode(tiny.encode(inputs), owner, boxes, multimask=False)[0]
    again = load(copy)
    logits, _ = again.decode(again.encode(inputs), owner, boxes, multimask=False)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", None, "cannot read config.json"),
        ("config.json", b"{", "not valid JSON"),
        ("config.json", b'{"model_type": "clip"}', "describes a 'clip' model"),
        ("config.json", b'{"model_type": "mobile_sam"}', "set segment.model: mobile_sam"),
        ("model.safetensors", None, "holds no model.safetensors; is it a directory"),
        ("model.safetensors", b"x", "not a safetensors file"),
    ],
)
def test_damaged_directories_are_refused(copy: Path, name: str, content: bytes | None, words: str) -> None:
    if content is None:
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(content)
    with pytest.raises(WeightsError, match=words):
        check_weights(copy)


def test_a_pickle_is_not_loaded(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin is not loaded, it may hold code"):
        load(copy)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("vision_config", "image_size", 120),
        ("prompt_encoder_config", "image_size", 64),
        ("mask_decoder_config", "hidden_size", 32),
        ("mask_decoder_config", "num_multimask_outputs", 2),
    ],
)
def test_sizes_that_do_not_fit_are_refused(copy: Path, part: str, field: str, value: int) -> None:
    fields = json.loads((copy / "config.json").read_text())
    fields[part][field] = value
    (copy / "config.json").write_text(json.dumps(fields))
    with pytest.raises(WeightsError):
        check_weights(copy)
