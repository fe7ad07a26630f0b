"""OwlViT against the installed transformers, and what its loader refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, OwlViTForObjectDetection, OwlViTImageProcessor, OwlViTProcessor

from owlsam_ray.errors import InputError, WeightsError
from owlsam_ray.models.owlvit import OwlVit, check_weights, embed_prompts, resolve_weights
from owlsam_ray.records import Detections
from owlsam_ray.settings import DetectorConfig
from owlsam_ray.stages.detect import select_detections
from tests.drawn_images import draw_image
from tests.seeded_owlvit import full_tokenizer, write_full, write_tiny

CPU = torch.device("cpu")
PROMPTS = ["a cat", "a traffic light", "a remote control", "a red ball", "a couch"]
FULL_IMAGES = ("000000000208", "000000000872")  # landscape and portrait


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("owlvit")
    write_tiny(directory, seed=1)
    return directory


@pytest.fixture(scope="module")
def full_directory(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("full")
    write_full(directory, shared)
    return directory


def ours(directory: Path, pictures: list[NDArray[np.uint8]], floor: float) -> list[Detections]:
    model = OwlVit.load(directory, device=CPU, dtype=torch.float32)
    boxes, scores = model.detect(
        torch.stack([model.preprocess(p) for p in pictures]), embed_prompts(directory, PROMPTS)
    )
    config = DetectorConfig(weights="unused", score_floor=floor, labels="best", clip_boxes=False)
    return [
        select_detections(
            model.unscale(boxes[row], (picture.shape[0], picture.shape[1])).numpy(),
            scores[row].numpy(),
            size_hw=(picture.shape[0], picture.shape[1]),
            prompt_labels=np.arange(len(PROMPTS)),
            settings=config,
        )
        for row, picture in enumerate(pictures)
    ]


def theirs(directory: Path, pictures: list[NDArray[np.uint8]], floor: float) -> list[dict[str, Tensor]]:
    """The documented way: processor, whole model with both towers, official post-processing."""
    processor = OwlViTProcessor(
        image_processor=OwlViTImageProcessor.from_pretrained(directory),
        tokenizer=AutoTokenizer.from_pretrained(directory),
    )
    model = OwlViTForObjectDetection.from_pretrained(directory).eval()
    result = []
    for picture in pictures:
        inputs = processor(text=[PROMPTS], images=Image.fromarray(picture), return_tensors="pt")
        with torch.inference_mode():
            outputs = model(**inputs)
        result += processor.post_process_grounded_object_detection(
            outputs, threshold=floor, target_sizes=[picture.shape[:2]]
        )
    return result


def compare(directory: Path, pictures: list[NDArray[np.uint8]], floor: float) -> None:
    for mine, official in zip(ours(directory, pictures, floor), theirs(directory, pictures, floor), strict=True):
        order = torch.argsort(official["scores"], descending=True, stable=True)
        assert len(order) >= 20
        np.testing.assert_allclose(mine.boxes_xyxy, official["boxes"][order].numpy(), rtol=0, atol=1e-3)
        np.testing.assert_allclose(mine.scores, official["scores"][order].numpy(), rtol=0, atol=1e-5)
        assert mine.labels.tolist() == official["labels"][order].tolist()


def test_full_size_equals_transformers(full_directory: Path, shared: Path) -> None:
    files = [shared / "data" / "coco_mini" / "images" / f"{name}.jpg" for name in FULL_IMAGES]
    pictures = [np.array(Image.open(file).convert("RGB")) for file in files]
    shapes = {picture.shape[0] > picture.shape[1] for picture in pictures}
    assert shapes == {True, False}
    compare(full_directory, pictures, floor=0.5)


def test_tokens_equal_the_reference(shared: Path) -> None:
    """The tokenizer that the full-size tests write is CLIP's."""
    reference = json.loads((shared / "data" / "clip_bpe" / "reference_tokens.json").read_text())
    tokenizer = full_tokenizer(shared)
    compared = 0
    for entry in (entry for entries in reference.values() for entry in entries):
        assert tokenizer(entry["name"])["input_ids"] == entry["raw"]
        assert tokenizer(f"a photo of a {entry['name']}")["input_ids"] == entry["photo"]
        compared += 1
    assert compared == 80 + 1203 + 365


def test_full_size_same_bits_at_batch_1_4_and_permuted(full_directory: Path, shared: Path) -> None:
    model = OwlVit.load(full_directory, device=CPU, dtype=torch.float32)
    files = sorted((shared / "data" / "coco_mini" / "images").iterdir())[:4]
    batch = torch.stack([model.preprocess(np.array(Image.open(file).convert("RGB"))) for file in files])
    queries = embed_prompts(full_directory, PROMPTS)
    same_bits_in_any_batch(model, batch, queries)
    boxes, scores = model.detect(batch, queries)
    for row in range(4):
        alone = model.detect(batch[row : row + 1], queries)
        assert torch.equal(alone[0][0], boxes[row])
        assert torch.equal(alone[1][0], scores[row])


def same_bits_in_any_batch(model: OwlVit, batch: Tensor, queries: Tensor) -> None:
    boxes, scores = model.detect(batch, queries)
    order = [2, 0, 3, 1]
    permuted = model.detect(batch[order], queries)
    assert torch.equal(permuted[0], boxes[order])
    assert torch.equal(permuted[1], scores[order])
    for row in range(4):
        padded = torch.cat([batch[row : row + 1], torch.zeros_like(batch[1:])])  # a call of the same shape
        alone = model.detect(padded, queries)
        assert torch.equal(alone[0][0], boxes[row])
        assert torch.equal(alone[1][0], scores[row])


def tiny_pictures() -> list[NDArray[np.uint8]]:
    return [np.array(draw_image(seed).resize(size)) for seed, size in ((1, (90, 60)), (2, (50, 77)), (3, (96, 96)))]


def test_tiny_equals_transformers(tiny_directory: Path) -> None:
    compare(tiny_directory, tiny_pictures(), floor=0.2)


def test_tiny_same_bits_in_any_batch(tmp_path: Path) -> None:
    """64 patches: a multiple of 16, as of every published model. With 36, AVX-512 treats the last ones apart."""
    write_tiny(tmp_path, side=128)
    model = OwlVit.load(tmp_path, device=CPU, dtype=torch.float32)
    batch = torch.stack([model.preprocess(np.array(draw_image(seed))) for seed in range(4)])
    same_bits_in_any_batch(model, batch, embed_prompts(tmp_path, PROMPTS))


def test_bf16_is_close(tiny_directory: Path) -> None:
    queries = embed_prompts(tiny_directory, PROMPTS)
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        model = OwlVit.load(tiny_directory, device=CPU, dtype=dtype)
        outputs.append(model.detect(torch.stack([model.preprocess(p) for p in tiny_pictures()]), queries))
    for exact, rounded in zip(*outputs, strict=True):
        assert rounded.dtype == torch.float32
        difference = (exact - rounded).abs()
        print(f"mean difference {difference.mean():.5f}")
        assert 0 < difference.mean() < 0.02


def test_queries_are_of_length_one_and_do_not_depend_on_their_number(tiny_directory: Path) -> None:
    prompts = [f"a thing {number}" for number in range(130)]  # three calls of the text tower
    queries = embed_prompts(tiny_directory, prompts)
    assert (queries.shape, queries.dtype) == ((130, 32), torch.float32)
    torch.testing.assert_close(queries.norm(dim=1), torch.ones(130))
    torch.testing.assert_close(embed_prompts(tiny_directory, prompts[100:101])[0], queries[100], rtol=0, atol=1e-6)


def test_a_prompt_that_is_too_long_is_never_cut(tiny_directory: Path) -> None:
    fits = "x" * 46  # with start and end, 48 tokens
    assert len(embed_prompts(tiny_directory, [fits])) == 1
    with pytest.raises(InputError, match=r"'x{47}' has 49 tokens with start and end, and the text tower takes 48"):
        embed_prompts(tiny_directory, ["a cat", fits + "x"])


def test_the_text_tower_is_not_kept(tiny_directory: Path) -> None:
    model = OwlVit.load(tiny_directory, device=CPU, dtype=torch.float32)
    names = [name for name, _ in model._model.named_parameters()]
    assert names
    assert not [name for name in names if "text" in name]


# Loading


@pytest.fixture
def copy(tiny_directory: Path, tmp_path: Path) -> Path:
    for file in tiny_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_other_tensors_are_named(copy: Path) -> None:
    state = load_file(copy / "model.safetensors")
    state["stranger"] = torch.zeros(2)
    state["class_head.dense0.bias"] = torch.zeros(7)
    del state["box_head.dense0.weight"]
    save_file(state, copy / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        check_weights(copy)
    for words in ("1 missing: box_head.dense0.weight", "1 unexpected: stranger (2,)", "class_head.dense0.bias (7,)"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", None, "cannot read config.json"),
        ("config.json", b"{", "not valid JSON"),
        ("config.json", b'{"model_type": "clip"}', "describes a 'clip' model"),
        ("model.safetensors", None, "holds no model.safetensors"),
        ("model.safetensors", b"x", "not a safetensors file"),
        ("tokenizer.json", None, "holds no tokenizer"),
    ],
)
def test_damaged_directories_are_refused(copy: Path, name: str, content: bytes | None, words: str) -> None:
    if content is None:
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(content)
    with pytest.raises(WeightsError, match=words):
        check_weights(copy)


def test_pickled_weights_are_not_loaded(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="it may hold code: convert it once"):
        check_weights(copy)


def test_a_centre_crop_is_refused(copy: Path) -> None:
    processor = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps(processor | {"do_center_crop": True}))
    with pytest.raises(WeightsError, match="would cut objects off"):
        OwlVit.load(copy, device=CPU, dtype=torch.float32)
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(WeightsError, match=r"holds no preprocessor_config\.json"):
        OwlVit.load(copy, device=CPU, dtype=torch.float32)


def test_resolving_names(tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_weights(str(tiny_directory)) == tiny_directory
    with pytest.raises(WeightsError, match="is not a directory in Hugging Face layout"):
        resolve_weights(str(tmp_path / "gone"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/has-this-model", "not a name"):
        with pytest.raises(WeightsError, match="neither a directory here nor to be had from the hub"):
            resolve_weights(name)
