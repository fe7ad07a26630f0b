"""MobileSAM against outputs of the official code, and what its loader refuses."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import SamConfig, SamModel, SamVisionConfig

from owlsam_ray.config.inference import SegmentConfig
from owlsam_ray.errors import WeightsError
from owlsam_ray.inference.segment import decode_boxes
from owlsam_ray.models.mobile_sam import MobileSam, check_weights, save_mobile_sam
from owlsam_ray.models.mobile_sam_layout import (
    UNUSED,
    MobileSamConfig,
    MobileSamModules,
    module_name,
    official_name,
    official_shapes,
)
from owlsam_ray.models.sam_frame import boxes_to_sam_frame, input_size_hw
from owlsam_ray.models.weights import check_layout, read_safetensors_shapes, sha256_of
from owlsam_ray.ops.masks import decode_rle, segments_from_logits
from owlsam_ray.records import Segment
from tests.seeded_mobile_sam import TINY, write_full, write_tiny

CPU = torch.device("cpu")
GOLDEN_IMAGES = ("000000000208", "000000000872")


def load(path: Path, dtype: torch.dtype = torch.float32) -> MobileSam:
    return MobileSam.load(str(path), device=CPU, dtype=dtype)


def drawn(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    """A picture with soft blobs and some noise."""
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 7, 3), np.uint8)).resize((width, height))
    return np.clip(np.array(coarse) + random.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def full_file(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("full") / "mobile_sam.pt"
    write_full(path, shared)
    return path


@pytest.fixture(scope="module")
def full(full_file: Path) -> MobileSam:
    return load(full_file)


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny(directory)
    return directory


@pytest.fixture(scope="module")
def tiny(tiny_directory: Path) -> MobileSam:
    return load(tiny_directory)


# Parity with the official code


class GoldenCase:
    """One picture, its embedding by our encoder, and what the official code says."""

    def __init__(self, name: str, shared: Path, model: MobileSam) -> None:
        golden = json.loads((shared / "golden" / "mobile_sam_golden.json").read_text())
        self.expected = next(case for case in golden["cases"] if case["file_name"] == f"{name}.jpg")
        with np.load(shared / "golden" / "mobile_sam_golden.npz", allow_pickle=False) as arrays:
            self.arrays = {key.removeprefix(f"{name}."): arrays[key] for key in arrays if key.startswith(name)}
        file = shared / "data" / "coco_mini" / "images" / f"{name}.jpg"
        self.pixels = np.array(Image.open(file).convert("RGB"))
        self.size_hw = (self.pixels.shape[0], self.pixels.shape[1])
        self.boxes = torch.from_numpy(
            boxes_to_sam_frame(
                np.array(self.expected["boxes_xyxy"], np.float32), size_hw=self.size_hw, image_size=model.image_size
            )
        )
        self.embedding = model.encode(model.preprocess(self.pixels)[None])

    def segments(self, logits: Tensor, quality: Tensor) -> list[Segment]:
        return segments_from_logits(
            logits, quality, size_hw=self.size_hw, input_hw=input_size_hw(self.size_hw, 1024), image_size=1024
        )

    def iou(self, segment: Segment, rle: dict[str, Any]) -> float:
        ours, official = (decode_rle(counts, self.size_hw) for counts in (segment.rle_counts, rle["counts"].encode()))
        assert official.any()
        return float((ours & official).sum() / (ours | official).sum())


@pytest.fixture(scope="module", params=GOLDEN_IMAGES)
def case(request: pytest.FixtureRequest, shared: Path, full: MobileSam) -> GoldenCase:
    return GoldenCase(request.param, shared, full)


def test_embedding_equals_the_official_one(case: GoldenCase) -> None:
    embedding = case.embedding
    assert embedding.shape == (1, 256, 64, 64)
    np.testing.assert_allclose(embedding[0, :, ::8, ::8].numpy(), case.arrays["embedding_s8"], rtol=0, atol=1e-4)
    assert embedding.mean().item() == pytest.approx(case.expected["embedding_mean"], abs=1e-6)
    assert embedding.std().item() == pytest.approx(case.expected["embedding_std"], abs=1e-5)


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_masks_equal_the_official_ones(case: GoldenCase, full: MobileSam, kind: str) -> None:
    zero = torch.zeros(4, dtype=torch.int64)
    logits, quality = full.decode(case.embedding, zero, case.boxes, multimask=kind == "multi")
    assert logits.shape == (4, 3 if kind == "multi" else 1, 256, 256)
    np.testing.assert_allclose(logits[:, :, ::4, ::4].numpy(), case.arrays[f"{kind}.low_res_s4"], rtol=0, atol=5e-4)
    np.testing.assert_allclose(quality.numpy(), case.arrays[f"{kind}.predicted_iou"], rtol=0, atol=1e-4)
    segments = case.segments(logits.flatten(0, 1), quality.flatten())
    official = [rle for box in case.expected[kind]["rle"] for rle in box]
    for segment, rle in zip(segments, official, strict=True):
        assert case.iou(segment, rle) >= 0.999
    areas = [area for box in case.expected[kind]["area"] for area in box]
    assert [segment.area for segment in segments] == pytest.approx(areas, rel=1e-3)


@pytest.mark.parametrize("masks", ["single", "best_of_three"])
def test_chosen_mask_equals_the_official_one(case: GoldenCase, full: MobileSam, masks: str) -> None:
    kind = "single" if masks == "single" else "multi"
    chosen = case.arrays[f"{kind}.predicted_iou"].argmax(axis=1)
    (decoded,) = decode_boxes(
        full,
        case.embedding,
        [case.boxes.numpy()],
        input_sizes_hw=[input_size_hw(case.size_hw, 1024)],
        batch_size=4,
        settings=SegmentConfig.model_validate({"weights": "w", "masks": masks}),
    )
    logits, quality = decoded.logits, decoded.predicted_iou
    assert (logits.dtype, quality.dtype) == (torch.float32, torch.float32)
    rows = np.arange(4)
    expected = case.arrays[f"{kind}.low_res_s4"][rows, chosen]
    np.testing.assert_allclose(logits[:, ::4, ::4].numpy(), expected, rtol=0, atol=5e-4)
    np.testing.assert_allclose(quality.numpy(), case.arrays[f"{kind}.predicted_iou"][rows, chosen], rtol=0, atol=1e-4)
    for row, segment in enumerate(case.segments(logits, quality)):
        assert case.iou(segment, case.expected[kind]["rle"][row][chosen[row]]) >= 0.999


def test_bf16_encoder_is_close(tiny_directory: Path, tiny: MobileSam) -> None:
    """Not at full size: a CPU takes a minute and a half for it."""
    model = load(tiny_directory, torch.bfloat16)
    inputs = tiny.preprocess(drawn(5, 100, 128))[None]
    expected = tiny.encode(inputs)
    for _ in range(2):  # the second call meets the encoder's cached attention biases
        embedding = model.encode(inputs)
    assert embedding.dtype == torch.float32
    difference = (embedding - expected).square().mean().sqrt() / expected.std()
    print(f"relative RMS difference {difference:.4f}")
    assert 1e-4 < difference < 0.05


# Batch mates


def test_encoding_does_not_depend_on_batch_mates(tiny: MobileSam) -> None:
    inputs = torch.stack(
        [tiny.preprocess(drawn(seed, 90 + seed, 120)) for seed in range(3)] + [torch.zeros(3, 128, 128)]
    )
    together = tiny.encode(inputs)
    assert together.shape == (4, TINY.prompt_dim, 8, 8)
    order = [2, 0, 3, 1]
    assert torch.equal(tiny.encode(inputs[order]), together[order])
    for row in range(4):
        alone = torch.cat([inputs[row : row + 1], torch.zeros(3, 3, 128, 128)])
        assert torch.equal(tiny.encode(alone)[0], together[row])


@pytest.mark.slow
def test_full_size_encoding_does_not_depend_on_batch_mates(full: MobileSam, shared: Path) -> None:
    """The same bits alone, and as the second of a padded batch of two."""
    case = GoldenCase(GOLDEN_IMAGES[1], shared, full)
    inputs = torch.zeros(2, 3, 1024, 1024)
    inputs[1] = full.preprocess(case.pixels)
    assert torch.equal(full.encode(inputs)[1], case.embedding[0])


@pytest.mark.parametrize("center_point", [False, True])
@pytest.mark.parametrize("multimask", [False, True])
def test_boxes_of_several_images_decode_as_one_image_at_a_time(
    tiny: MobileSam, multimask: bool, center_point: bool
) -> None:
    kind = {"multimask": multimask, "center_point": center_point}
    embeddings = tiny.encode(torch.stack([tiny.preprocess(drawn(seed, 100, 128)) for seed in range(3)]))
    print("seed 9")
    corners = torch.from_numpy(np.random.default_rng(9).uniform(0, 128, (8, 2, 2)).astype(np.float32)).sort(1).values
    boxes, owner = corners.reshape(8, 4), torch.tensor([2, 0, 1, 1, 0, 2, 2, 0])
    logits, quality = tiny.decode(embeddings, owner, boxes, **kind)
    count = 3 if multimask else 1
    assert (logits.shape, quality.shape) == ((8, count, 32, 32), (8, count))
    assert not torch.allclose(logits[0], logits[5], atol=0.1), "masks of an image differ from box to box"
    for image in range(3):
        rows = torch.nonzero(owner == image)[:, 0]
        # Filled up to a call of the same shape, as the segment stage does it: the same bits.
        padded = torch.cat([boxes[rows], torch.zeros(8 - len(rows), 4)])
        alone, alone_quality = tiny.decode(
            embeddings[image : image + 1], torch.zeros(8, dtype=torch.int64), padded, **kind
        )
        assert torch.equal(alone[: len(rows)], logits[rows])
        assert torch.equal(alone_quality[: len(rows)], quality[rows])
        # In a call of another shape the sums may be taken in another order.
        fewer, _ = tiny.decode(embeddings, torch.full((len(rows),), image), boxes[rows], **kind)
        torch.testing.assert_close(fewer, logits[rows], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_full_size_decoding_of_two_images_equals_one_at_a_time(full: MobileSam, shared: Path) -> None:
    cases = [GoldenCase(name, shared, full) for name in GOLDEN_IMAGES]
    embeddings = torch.cat([case.embedding for case in cases])
    owner = torch.tensor([1, 0, 0, 1])
    boxes = torch.stack([cases[image].boxes[row] for row, image in enumerate(owner.tolist())])
    together = full.decode(embeddings, owner, boxes, multimask=False)
    for image in (0, 1):
        rows = torch.nonzero(owner == image)[:, 0]
        padded = torch.cat([boxes[rows], torch.zeros(2, 4)])
        alone = full.decode(embeddings[image : image + 1], torch.zeros(4, dtype=torch.int64), padded, multimask=False)
        assert torch.equal(alone[0][:2], together[0][rows])
        assert torch.equal(alone[1][:2], together[1][rows])


def test_no_box_no_mask(tiny: MobileSam) -> None:
    embeddings = tiny.encode(torch.zeros(1, 3, 128, 128))
    none = torch.zeros(0, dtype=torch.int64)
    for multimask, count in ((False, 1), (True, 3)):
        logits, quality = tiny.decode(embeddings, none, torch.zeros(0, 4), multimask=multimask)
        assert (logits.shape, quality.shape) == ((0, count, 32, 32), (0, count))


def test_the_centre_is_a_prompt_of_its_own(tiny: MobileSam) -> None:
    embeddings = tiny.encode(tiny.preprocess(drawn(4, 128, 128))[None])
    boxes, owner = torch.tensor([[5.0, 5, 90, 60], [40, 40, 128, 128]]), torch.zeros(2, dtype=torch.int64)
    without, _ = tiny.decode(embeddings, owner, boxes, multimask=False)
    given, _ = tiny.decode(embeddings, owner, boxes, multimask=False, center_point=True)
    assert (given - without).abs().amax(dim=(1, 2, 3)).min() > 0.1


def test_tiny_masks_are_not_degenerate(tiny: MobileSam) -> None:
    """Other tests rely on it: masks of several areas, no empty or full ones."""
    embeddings = tiny.encode(tiny.preprocess(drawn(11, 96, 128))[None])
    boxes = torch.tensor([[0.0, 0, 128, 96], [0, 0, 64, 48], [64, 48, 128, 96], [50, 30, 60, 40]])
    logits, quality = tiny.decode(embeddings, torch.zeros(4, dtype=torch.int64), boxes, multimask=False)
    segments = segments_from_logits(logits[:, 0], quality[:, 0], size_hw=(96, 128), input_hw=(96, 128), image_size=128)
    shares = [segment.area / (96 * 128) for segment in segments]
    assert 0.02 < min(shares) < max(shares) < 0.98
    assert len(set(shares)) == 4
    assert all(0.02 < segment.stability < 0.98 for segment in segments)


# The sam frame


@pytest.mark.parametrize(
    ("size_hw", "expected"),
    [
        ((480, 640), (768, 1024)),
        ((640, 621), (1024, 994)),  # 993.6
        ((427, 640), (683, 1024)),  # 683.2
        ((1024, 1024), (1024, 1024)),
        ((9000, 12000), (768, 1024)),
        ((1, 5000), (1, 1024)),  # 0.2 would be no row at all
    ],
)
def test_input_size(size_hw: tuple[int, int], expected: tuple[int, int]) -> None:
    assert input_size_hw(size_hw, 1024) == expected
    assert input_size_hw(size_hw[::-1], 1024) == expected[::-1]


def test_preprocess_resizes_normalises_and_pads(tiny: MobileSam) -> None:
    pixels = drawn(3, 61, 200)
    frame = tiny.preprocess(pixels)
    assert (frame.shape, frame.dtype) == ((3, 128, 128), torch.float32)
    resized = np.array(Image.fromarray(pixels).resize((128, 39), Image.Resampling.BILINEAR), np.float64)
    expected = (resized - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
    np.testing.assert_allclose(frame[:, :39].permute(1, 2, 0).numpy(), expected, rtol=0, atol=1e-6)
    assert not frame[:, 39:].any()


def test_boxes_scale_with_each_axis_own_rounding() -> None:
    boxes: NDArray[np.float32] = np.array([[0, 0, 621, 640], [10, 20, 30.5, 40.25]], np.float32)
    scaled = boxes_to_sam_frame(boxes, size_hw=(640, 621), image_size=1024)
    assert scaled.dtype == np.float32
    expected = np.array([[0, 0, 994, 1024], [10 * 994 / 621, 32, 30.5 * 994 / 621, 64.4]])
    np.testing.assert_allclose(scaled, expected, rtol=1e-6)
    assert boxes_to_sam_frame(boxes[:0], size_hw=(640, 621), image_size=1024).shape == (0, 4)


# Names and sizes


def test_official_names_and_shapes(shared: Path) -> None:
    keys = json.loads((shared / "golden" / "mobile_sam_keys.json").read_text())
    shapes = official_shapes(MobileSamConfig())
    assert {name: tuple(shape) for name, shape in keys.items() if name not in UNUSED} == shapes
    assert set(keys) - set(shapes) == set(UNUSED)


@pytest.mark.parametrize("config", [TINY, TINY.model_copy(update={"decoder_layers": 3, "depths": (2, 1, 3, 2)})])
def test_names_translate_both_ways(config: MobileSamConfig) -> None:
    names = list(MobileSamModules(config).state_dict())
    official = [official_name(name) for name in names]
    assert [module_name(name) for name in official] == names
    assert len(set(official)) == len(names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 130}, "image_size 130 is not a multiple of 16"),
        ({"num_heads": (3, 2, 2, 2)}, "embed_dims"),
        ({"prompt_dim": 36}, "prompt_dim 36"),
        ({"decoder_heads": 3}, "prompt_dim 64"),
        ({"depths": (1, 1, 1)}, "depths"),
        ({"model_type": "sam"}, r"model_type sam.*set segment\.model: sam"),
        ({"model_type": "sam2"}, "model_type"),
        ({"colour": 1}, "colour"),
    ],
)
def test_config_that_does_not_fit_is_refused(
    tiny_directory: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = json.loads((tiny_directory / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((tiny_directory / "model.safetensors").read_bytes())
    with pytest.raises(WeightsError, match=message) as caught:
        check_weights(str(tmp_path))
    assert str(tmp_path / "config.json") in str(caught.value)


# Loading and saving


def equal_models(first: MobileSam, second: MobileSam) -> bool:
    batch = first.preprocess(drawn(1, 80, 128))[None]
    return torch.equal(first.encode(batch), second.encode(batch))


def test_directory_round_trip_is_byte_identical(tiny: MobileSam, tiny_directory: Path, tmp_path: Path) -> None:
    tiny.export(tmp_path / "deep" / "copy")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "deep" / "copy" / name).read_bytes() == (tiny_directory / name).read_bytes()
    assert equal_models(load(tmp_path / "deep" / "copy"), tiny)


@pytest.mark.slow
def test_official_safetensors_and_directory_equal_the_pickle(full_file: Path, full: MobileSam, tmp_path: Path) -> None:
    state = torch.load(full_file, weights_only=True)
    assert set(UNUSED) < set(state)
    save_file(state, tmp_path / "mobile_sam.safetensors")
    full.export(tmp_path / "directory")
    batch = full.preprocess(drawn(2, 90, 128))[None]
    expected = full.encode(batch)
    for path in (tmp_path / "mobile_sam.safetensors", tmp_path / "directory"):
        check_weights(str(path))
        assert torch.equal(load(path).encode(batch), expected)


def test_batch_counters_may_be_left_out(tiny: MobileSam, tiny_directory: Path, tmp_path: Path) -> None:
    state = load_file(tiny_directory / "model.safetensors")
    save_mobile_sam({name: value for name, value in state.items() if "num_batches" not in name}, TINY, tmp_path)
    assert equal_models(load(tmp_path), tiny)


def test_saving_refuses_what_loading_would_refuse(tiny_directory: Path, tmp_path: Path) -> None:
    state = load_file(tiny_directory / "model.safetensors")
    state.pop("mask_decoder.iou_token.weight")
    with pytest.raises(WeightsError, match=r"mask_decoder\.iou_token\.weight"):
        save_mobile_sam(state, TINY, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def without_decoder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("mask_decoder.")}


def with_stranger(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {"image_encoder.stranger.weight": torch.zeros(7, 2)}


def with_wrong_shape(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {"image_encoder.neck.0.weight": torch.zeros(256, 64, 1, 1)}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (without_decoder, ["120 missing", "mask_decoder.transformer.layers.0", ", …"]),
        (with_stranger, ["1 unexpected", "image_encoder.stranger.weight (7, 2)"]),
        (with_wrong_shape, ["1 of another shape", "neck.0.weight (256, 64, 1, 1) instead of (256, 320, 1, 1)"]),
        (lambda state: {}, ["missing", "image_encoder.patch_embed.seq.0.c.weight (32, 3, 3, 3)"]),
    ],
)
def test_other_layouts_name_file_and_tensors(
    full_file: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], parts: list[str]
) -> None:
    path = tmp_path / "other.pt"
    torch.save(change(torch.load(full_file, weights_only=True)), path)
    for action in (lambda: check_weights(str(path)), lambda: load(path)):
        with pytest.raises(WeightsError) as caught:
            action()
        for part in [str(path), "Expected: the official mobile_sam.pt", *parts]:
            assert part in str(caught.value)


def test_hugging_face_layout_is_refused(tmp_path: Path) -> None:
    vision = SamVisionConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, global_attn_indexes=[0])
    model = SamModel(SamConfig(vision_config=vision))
    save_file({name: value.clone() for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="missing") as caught:
        check_weights(str(tmp_path / "model.safetensors"))
    assert "unexpected" in str(caught.value)


class RunsCode:
    """A pickle of it calls a function when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


class Harmless:
    """A class of ours in a pickle."""


@pytest.mark.parametrize("how", ["zip", "legacy", "plain pickle", "class", "module"])
def test_pickles_with_code_are_refused_and_not_run(tmp_path: Path, how: str) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "ran"
    if how == "plain pickle":
        path.write_bytes(pickle.dumps({"weight": RunsCode(trace)}, protocol=2))
    else:
        held: Any = {"class": Harmless(), "module": torch.nn.Linear(2, 2)}.get(how, RunsCode(trace))
        torch.save({"weight": held}, path, _use_new_zipfile_serialization=how != "legacy")
    with pytest.raises(WeightsError, match=r"evil\.pt was refused.*code in a weight file is never run"):
        load(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80", b"not weights at all\n", b"PK\x03\x04" + bytes(100), bytes(1000), bytes(range(256)) * 20],
    ids=["empty", "one byte", "text", "torn zip", "zeros", "bytes"],
)
@pytest.mark.parametrize("suffix", ["pt", "pth", "safetensors"])
def test_files_that_are_no_weights_are_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=rf"weights\.{suffix}"):
        check_weights(str(path))


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_cut_off_files_are_refused(tiny_directory: Path, tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"cut.{suffix}"
    state = load_file(tiny_directory / "model.safetensors")
    if suffix == "pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(WeightsError, match=rf"cut\.{suffix}"):
        check_weights(str(path))


@pytest.mark.parametrize("content", [[1, 2], {"model": {"a": torch.zeros(1)}}, {1: torch.zeros(1)}, torch.zeros(2)])
def test_other_things_than_a_table_of_tensors_are_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(WeightsError, match=r"odd\.pt does not hold a plain dict of tensors"):
        check_weights(str(tmp_path / "odd.pt"))


def test_what_is_not_there_is_named(tiny_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no segmenter weights at .*gone\.pt"):
        check_weights(str(tmp_path / "gone.pt"))
    with pytest.raises(WeightsError, match=r"cannot read .*config\.json"):
        check_weights(str(tmp_path))
    (tmp_path / "config.json").write_bytes((tiny_directory / "config.json").read_bytes())
    with pytest.raises(WeightsError, match=r"no segmenter weights at .*model\.safetensors"):
        check_weights(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json does not describe a MobileSAM"):
        check_weights(str(tmp_path))


# weights.py


def test_sha256_covers_what_a_loader_may_read(tiny_directory: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_directory / name).read_bytes())
    before = sha256_of(tmp_path)
    assert before == sha256_of(tiny_directory)
    (tmp_path / "README.md").write_text("no weights")
    assert sha256_of(tmp_path) == before
    (tmp_path / "merges.txt").write_text("a b")
    with_merges = sha256_of(tmp_path)
    (tmp_path / "merges.txt").rename(tmp_path / "other.txt")
    assert len({before, with_merges, sha256_of(tmp_path)}) == 3
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(WeightsError, match="gone"):
        sha256_of(tmp_path / "gone")


def test_shapes_come_from_the_header(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(())}, path, metadata={"format": "pt"})
    assert read_safetensors_shapes(path) == {"a": (2, 3), "b": ()}
    path.write_bytes(struct.pack("<Q", 2) + b"{}")
    assert read_safetensors_shapes(path) == {}
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(WeightsError, match=r"a\.safetensors is not a safetensors file"):
        read_safetensors_shapes(path)
    with pytest.raises(WeightsError, match="cannot read weights"):
        read_safetensors_shapes(tmp_path / "gone.safetensors")


def test_layout_message_names_at_most_five() -> None:
    expected = {f"layer.{index}": (index, 2) for index in range(7)}
    check_layout(expected, expected, source="a.pt", hint="try b")
    check_layout({}, {"old": (1,)}, source="a.pt", hint="try b", ignored=["old"])
    found = {"layer.0": (5, 5), "new": (1,)}
    with pytest.raises(WeightsError) as caught:
        check_layout(expected, found, source="a.pt", hint="try b")
    message = str(caught.value)
    assert message.splitlines()[0] == "a.pt does not fit the model:"
    assert "6 missing: layer.1 (1, 2), layer.2 (2, 2), layer.3 (3, 2), layer.4 (4, 2), layer.5 (5, 2), …" in message
    assert "1 unexpected: new (1,)" in message
    assert "1 of another shape: layer.0 (5, 5) instead of (0, 2)" in message
    assert message.endswith("try b")
