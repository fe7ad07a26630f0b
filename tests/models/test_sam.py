"""SAM against transformers' own `SamModel` and `SamProcessor`, and what its loader refuses."""

import copy
import itertools
import json
import re
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

from owlsam_ray.config.inference import SegmentConfig
from owlsam_ray.config.load import load_config
from owlsam_ray.errors import WeightsError
from owlsam_ray.inference.load import open_engine
from owlsam_ray.inference.queries import embed_vocabulary
from owlsam_ray.inference.segment import decode_boxes
from owlsam_ray.models.arithmetic import restored_arithmetic
from owlsam_ray.models.load import find_models
from owlsam_ray.models.sam import Sam, check_weights
from owlsam_ray.models.sam_frame import boxes_to_sam_frame, input_size_hw
from owlsam_ray.ops.masks import decode_rle, segments_from_logits
from owlsam_ray.parallel.allocation import allocate
from owlsam_ray.records import EncodedImage
from owlsam_ray.vocabulary import resolve_vocabulary
from tests.oracles import stability_loop
from tests.runs import TinyRun, make_tiny_run
from tests.seeded_sam import TINY_SIDE, processor, write_full, write_tiny

CPU = torch.device("cpu")
Pixels = NDArray[np.uint8]


def load(path: Path, dtype: torch.dtype = torch.float32) -> Sam:
    return Sam.load(path, device=CPU, dtype=dtype)


@dataclass
class Both:
    """One picture through our code and through transformers', the encoders once and one after the other."""

    directory: Path
    pixels: Pixels
    boxes: NDArray[np.float32]

    def __post_init__(self) -> None:
        self.size_hw = (self.pixels.shape[0], self.pixels.shape[1])
        theirs = SamModel.from_pretrained(self.directory).eval()
        self.processor = processor(theirs.config.vision_config.image_size)
        self.expected_inputs = self._process()["pixel_values"]
        with torch.inference_mode():
            self.expected_embedding = theirs.get_image_embeddings(self.expected_inputs)
        # From here on only their decoder is needed: a copy, or its tensors would keep the whole file in memory.
        theirs.vision_encoder = torch.nn.Identity()
        self.theirs = copy.deepcopy(theirs)
        del theirs
        self.ours = load(self.directory)
        self.inputs = self.ours.preprocess(self.pixels)[None]
        self.embedding = self.ours.encode(self.inputs)
        self.input_hw = input_size_hw(self.size_hw, self.ours.image_size)
        self.in_frame = boxes_to_sam_frame(self.boxes, size_hw=self.size_hw, image_size=self.ours.image_size)

    def _process(self, **prompts: Any) -> Any:
        return self.processor(Image.fromarray(self.pixels), return_tensors="pt", **prompts)

    def decode(self, *, multimask: bool, center_point: bool) -> tuple[Tensor, Tensor]:
        owner = torch.zeros(len(self.boxes), dtype=torch.int64)
        return self.ours.decode(
            self.embedding, owner, torch.from_numpy(self.in_frame), multimask=multimask, center_point=center_point
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

    def stability(self, logits: Tensor) -> NDArray[np.float64]:
        """(M, K) of (M, K, m, m), by plain loops."""
        side = self.ours.image_size
        return np.array([stability_loop(of_box, input_hw=self.input_hw, image_size=side) for of_box in logits])

    def full_size(self, logits: Tensor, quality: Tensor) -> NDArray[np.bool_]:
        """(N, H, W) masks of (N, m, m) logits and (N,) predicted IoU, as a run stores them."""
        segments = segments_from_logits(
            logits, quality, size_hw=self.size_hw, input_hw=self.input_hw, image_size=self.ours.image_size
        )
        return np.stack([decode_rle(segment.rle_counts, self.size_hw) for segment in segments])

    def run(self, by: str, prompt: str) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
        """(M, H, W) masks and (M,) predicted IoU through the stages of a run."""
        settings = SegmentConfig.model_validate({"weights": "w", "masks": by, "prompt": prompt})
        (decoded,) = decode_boxes(
            self.ours, self.embedding, [self.in_frame], input_sizes_hw=[self.input_hw], batch_size=4, settings=settings
        )
        masks = self.full_size(decoded.logits, decoded.predicted_iou)
        return masks[decoded.index], decoded.predicted_iou.numpy()[decoded.index]


def boxes_of(pixels: Pixels) -> NDArray[np.float32]:
    """All of it, its middle, an upper left and a lower right part, with fractions of pixels."""
    height, width = pixels.shape[:2]
    parts = np.array([[0, 0, 1, 1], [0.25, 0.3, 0.7, 0.8], [0.02, 0.05, 0.4, 0.5], [0.5, 0.45, 0.98, 0.93]], np.float32)
    return parts * np.array([width, height, width, height], np.float32)


def assert_same(masks: NDArray[np.bool_], expected: NDArray[np.bool_]) -> None:
    """Each (H, W) of (…, H, W): an IoU of at least 0.999, two empty ones included."""
    assert masks.shape == expected.shape
    union, common = ((how(masks, expected)).sum(axis=(-2, -1)) for how in (np.logical_or, np.logical_and))
    assert (common >= 0.999 * union).all(), common / union


def compare(both: Both) -> dict[str, float]:
    """Everything from pixels to masks; returns the largest differences.

    The embedding's values have a standard deviation near 1 after the neck's norm: 1e-4 leaves room for another order
    of sums in a convolution, and none for another padding or rounding of the picture.
    """
    largest = {
        "inputs": close(both.inputs, both.expected_inputs, 1e-5),
        "embedding": close(both.embedding, both.expected_embedding, 1e-4),
    }
    for multimask, prompt in itertools.product((False, True), ("box", "box_and_center")):
        kind = {"multimask": multimask, "center_point": prompt == "box_and_center"}
        logits, quality = both.decode(**kind)
        expected_logits, expected_quality, expected_masks = both.expect(**kind)
        for name, difference in (
            ("logits", close(logits, expected_logits, 5e-4)),
            ("predicted_iou", close(quality, expected_quality, 1e-4)),
        ):
            largest[name] = max(difference, largest.get(name, 0.0))
        every = both.full_size(logits.flatten(0, 1), quality.flatten())
        assert_same(every.reshape(expected_masks.shape), expected_masks)
        ratings = {"single": expected_quality.numpy()}
        if multimask:
            ratings = {"best_of_three": expected_quality.numpy(), "most_stable": both.stability(expected_logits)}
        for by, rating in ratings.items():
            masks, chosen_quality = both.run(by, prompt)
            wanted = (np.arange(len(rating)), rating.argmax(axis=1))
            assert_same(masks, expected_masks[wanted])
            np.testing.assert_allclose(chosen_quality, expected_quality.numpy()[wanted], rtol=0, atol=1e-4)
    return largest


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> float:
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=0, atol=tolerance)
    return float((ours - theirs).abs().max())


# Full size


@pytest.fixture(scope="module")
def full_directory(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sam")
    write_full(directory, shared)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("picture", ["landscape", "portrait", "square", "tiny"])
def test_vit_b_equals_transformers(full_directory: Path, shared: Path, picture: str) -> None:
    name = "000000000872" if picture == "portrait" else "000000000208"
    image = Image.open(shared / "data" / "coco_mini" / "images" / f"{name}.jpg").convert("RGB")
    if picture == "tiny":
        image = image.resize((40, 30))
    if picture == "square":
        image = image.crop((100, 0, 580, 480))
    pixels = np.array(image)
    assert (pixels.shape[0] > pixels.shape[1]) == (picture == "portrait")
    both = Both(full_directory, pixels, boxes_of(pixels)[1:])
    print(picture, pixels.shape, compare(both))
    worth_comparing(both)


def worth_comparing(both: Both) -> None:
    """Masks neither empty nor full, different from box to box, and numbers that do not saturate."""
    masks, _ = both.run("single", "box")
    shares = masks.mean(axis=(1, 2))
    logits, quality = both.decode(multimask=True, center_point=False)
    stability = both.stability(logits)
    print(f"shares {shares}\npredicted IoU {quality.tolist()}\nstability {stability.tolist()}")
    assert len({mask.tobytes() for mask in masks}) == len(masks)
    assert ((shares > 0.02) & (shares < 0.98)).all()
    assert ((stability > 0.05) & (stability < 0.98)).all()
    assert np.ptp(stability) > 0.1
    assert float(quality.std(dim=1).min()) > 0.05, "the three masks of a box are rated alike"
    assert float(quality.std(dim=0).max()) > 0.01, "boxes have no say in the ratings"


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
def test_tiny_equals_transformers(tiny_directory: Path, size_hw: tuple[int, int]) -> None:
    pixels = drawn(sum(size_hw), *size_hw)
    print(compare(Both(tiny_directory, pixels, boxes_of(pixels))))


def test_tiny_masks_are_worth_comparing(tiny_directory: Path) -> None:
    pixels = drawn(4, 96, 128)
    worth_comparing(Both(tiny_directory, pixels, boxes_of(pixels)))


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


@pytest.mark.parametrize("size_hw", [(1, 400), (400, 1)])
def test_a_hairline_keeps_a_row_or_column(tiny: Sam, size_hw: tuple[int, int]) -> None:
    """transformers resizes these to nothing, and fails."""
    frame = tiny.preprocess(np.full((*size_hw, 3), 255, np.uint8))
    height, width = (1 if side == 1 else TINY_SIDE for side in size_hw)
    assert (frame[:, :height, :width] > 1).all()
    assert frame.count_nonzero() == 3 * TINY_SIDE


def test_no_box_no_mask(tiny: Sam) -> None:
    embedding = tiny.encode(torch.zeros(1, 3, TINY_SIDE, TINY_SIDE))
    none = torch.zeros(0, dtype=torch.int64)
    for multimask, count in ((False, 1), (True, 3)):
        logits, quality = tiny.decode(embedding, none, torch.zeros(0, 4), multimask=multimask)
        assert (logits.shape, quality.shape) == ((0, count, TINY_SIDE // 4, TINY_SIDE // 4), (0, count))


# Loading


@pytest.fixture
def directory(tiny_directory: Path, tmp_path: Path) -> Path:
    for file in tiny_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("mask_decoder.iou_token.weight", None, "1 missing: mask_decoder.iou_token.weight (1, 64)"),
        ("stranger", torch.zeros(2), "1 unexpected: stranger (2,)"),
        (
            "vision_encoder.neck.conv1.weight",
            torch.zeros(7),
            "1 of another shape: vision_encoder.neck.conv1.weight (7,) instead of (64, 32, 1, 1)",
        ),
        ("shared_image_embedding.positional_embedding", None, "2 missing: shared_image_embedding.positional_embedding"),
    ],
)
def test_tensors_that_do_not_fit_are_named(directory: Path, name: str, value: Tensor | None, words: str) -> None:
    state = load_file(directory / "model.safetensors")
    state.pop(name, None)
    save_file(state if value is None else state | {name: value}, directory / "model.safetensors")
    for refuses in (check_weights, load):
        with pytest.raises(WeightsError, match=re.escape(words)):
            refuses(directory)


@pytest.mark.parametrize("names", [("own",), ("own", "tied"), ("tied",)])
def test_the_frequencies_may_stand_under_either_name(directory: Path, tiny: Sam, names: tuple[str, ...]) -> None:
    state = load_file(directory / "model.safetensors")
    places = {
        "own": "shared_image_embedding.positional_embedding",
        "tied": "prompt_encoder.shared_embedding.positional_embedding",
    }
    frequencies = state.pop(places["own"])
    save_file(state | {places[name]: frequencies.clone() for name in names}, directory / "model.safetensors")
    inputs = tiny.preprocess(drawn(6, 50, 60))[None]
    boxes, owner = torch.tensor([[3.0, 4, 50, 60]]), torch.zeros(1, dtype=torch.int64)
    expected = tiny.decode(tiny.encode(inputs), owner, boxes, multimask=False)[0]
    again = load(directory)
    logits, _ = again.decode(again.encode(inputs), owner, boxes, multimask=False)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", None, "cannot read config.json"),
        ("config.json", b"{", "not valid JSON"),
        ("config.json", b"[]", "describes a None model"),
        ("config.json", b'{"model_type": "clip"}', "describes a 'clip' model"),
        ("config.json", b'{"model_type": "mobile_sam"}', "set segment.model: mobile_sam"),
        ("model.safetensors", None, "holds no model.safetensors; is it a directory"),
        ("model.safetensors", b"x", "not a safetensors file"),
        ("preprocessor_config.json", b"{", "does not describe SAM's preprocessing"),
        (
            "preprocessor_config.json",
            b'{"size": {"longest_edge": 99}}',
            "sets size.longest_edge to 99, and SAM needs 128",
        ),
        (
            "preprocessor_config.json",
            b'{"size": {"longest_edge": 128}, "resample": 3}',
            "sets resample to 3, and SAM needs 2",
        ),
    ],
)
def test_damaged_directories_are_refused(directory: Path, name: str, content: bytes | None, words: str) -> None:
    if content is None:
        (directory / name).unlink()
    else:
        (directory / name).write_bytes(content)
    with pytest.raises(WeightsError, match=words):
        check_weights(directory)


@pytest.mark.parametrize("kept", [0.3, 0.99])
def test_a_cut_off_file_is_refused(directory: Path, kept: float) -> None:
    file = directory / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(WeightsError, match="is truncated"):
        check_weights(directory)


def test_a_file_whose_header_lies_is_refused(directory: Path) -> None:
    """Names and shapes are right, so only reading the values can tell."""
    file = directory / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"dtype":"F32"', b'"dtype":"F64"', 1))
    with pytest.raises(WeightsError, match=r"is not a valid safetensors file, export the weights again"):
        load(directory)


def test_a_pickle_is_not_loaded(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin is not loaded, since it may hold code"):
        load(directory)


@pytest.mark.parametrize(
    ("part", "field", "value", "words"),
    [
        ("vision_config", "image_size", 120, "prompt_encoder_config.image_size is 128, and must be 120"),
        ("vision_config", "patch_size", 8, "vision_config.patch_size is 8, and must be 16"),
        ("vision_config", "output_channels", 32, "prompt_encoder_config.hidden_size is 64, and must be 32"),
        ("vision_config", "num_pos_feats", 16, "vision_config.num_pos_feats is 32, and must be 64"),
        ("prompt_encoder_config", "image_size", 64, "prompt_encoder_config.image_size is 64, and must be 128"),
        ("prompt_encoder_config", "patch_size", 8, "prompt_encoder_config.patch_size is 8, and must be 16"),
        ("mask_decoder_config", "hidden_size", 32, "mask_decoder_config.hidden_size is 32, and must be 64"),
        ("mask_decoder_config", "num_multimask_outputs", 2, "num_multimask_outputs is 2, and must be 3"),
        ("vision_config", "image_size", "large", "does not describe a SAM"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(directory: Path, part: str, field: str, value: object, words: str) -> None:
    fields = json.loads((directory / "config.json").read_text())
    fields[part][field] = value
    (directory / "config.json").write_text(json.dumps(fields))
    with pytest.raises(WeightsError, match=words) as caught:
        check_weights(directory)
    assert str(directory / "config.json") in str(caught.value)


def test_a_side_that_is_no_multiple_of_a_patch_is_refused(directory: Path) -> None:
    fields = json.loads((directory / "config.json").read_text())
    for part in ("vision_config", "prompt_encoder_config"):
        fields[part]["image_size"] = 120
    (directory / "config.json").write_text(json.dumps(fields))
    with pytest.raises(WeightsError, match="image_size 120 is not an integer multiple of 16"):
        check_weights(directory)


# The whole engine


@pytest.fixture(scope="module")
def drawn_run(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    sam = {"model": "sam", "weights": str(tiny_directory)}
    return make_tiny_run(tmp_path_factory.mktemp("run"), num_images=2, segment=sam)


@pytest.mark.parametrize("prompt", ["box", "box_and_center"])
@pytest.mark.parametrize("by", ["single", "best_of_three", "most_stable"])
def test_the_engine_gives_the_masks_of_transformers(
    drawn_run: TinyRun, tiny_directory: Path, by: str, prompt: str
) -> None:
    settings = {"segment.masks": by, "segment.prompt": prompt, "resources.torch_threads": torch.get_num_threads()}
    config = load_config([drawn_run.run_file], overrides=[f"{name}={value}" for name, value in settings.items()])
    files = sorted((drawn_run.root / "data" / "images").rglob("*.*g"))
    models = find_models(config.detector, config.segment)
    vocabulary = resolve_vocabulary(config.vocabulary, [])
    queries = embed_vocabulary(vocabulary, config, detector_weights=models.detector)
    allocation = allocate(config.resources, num_cpus=1, num_gpus=0)
    with restored_arithmetic(), open_engine(config, allocation, models=models, queries=queries) as engine:
        rows, _ = engine.annotate([EncodedImage(number, file.read_bytes()) for number, file in enumerate(files)])
    assert [row.image_id for row in rows] == [0, 1]
    for row, file in zip(rows, files, strict=True):
        assert len(row.segments) == len(row.detections) > 0
        pixels = np.array(Image.open(file).convert("RGB"))
        both = Both(tiny_directory, pixels, row.detections.boxes_xyxy)
        logits, quality, masks = both.expect(multimask=by != "single", center_point=prompt == "box_and_center")
        rating = both.stability(logits) if by == "most_stable" else quality.numpy()
        wanted = (np.arange(len(rating)), rating.argmax(axis=1))
        segments = [segment for segment in row.segments if segment is not None]
        assert_same(np.stack([decode_rle(segment.rle_counts, both.size_hw) for segment in segments]), masks[wanted])
        np.testing.assert_allclose(
            [segment.predicted_iou for segment in segments], quality.numpy()[wanted], rtol=0, atol=1e-4
        )
        np.testing.assert_allclose(
            [segment.stability for segment in segments], both.stability(logits)[wanted], rtol=0, atol=0.01
        )
        assert all(segment.area > 0 for segment in segments)
