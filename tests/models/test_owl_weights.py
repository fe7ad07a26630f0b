"""What the loader of detectors refuses, and what it gives."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Owlv2ForObjectDetection, OwlViTForObjectDetection

from owlsam_ray.errors import WeightsError
from owlsam_ray.models.owl_weights import (
    Family,
    check_weights,
    family_of,
    load_config,
    load_model,
    load_tokenizer,
    ready,
)
from tests.seeded_owlvit import TINY_SIDE, write_tiny

FAMILIES: tuple[Family, ...] = ("owlvit", "owlv2")


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Family:
    family: Family = request.param
    return family


@pytest.fixture
def directory(model: Family, tmp_path: Path) -> Path:
    write_tiny(tmp_path, seed=1, family=model)
    return tmp_path


def test_a_whole_directory_loads(directory: Path, model: Family) -> None:
    check_weights(directory, model)
    assert family_of(directory) == model
    assert load_config(directory).vision_config.image_size == TINY_SIDE
    assert load_tokenizer(directory)("a")["input_ids"]
    loaded = load_model(directory)
    assert isinstance(loaded, Owlv2ForObjectDetection if model == "owlv2" else OwlViTForObjectDetection)
    theirs = type(loaded).from_pretrained(directory)
    tensors, wanted = (dict([*one.named_parameters(), *one.named_buffers()]) for one in (loaded, theirs))
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, wanted[name].reshape(tensor.shape)), name


def test_halves_become_float32(directory: Path) -> None:
    state = load_file(directory / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in state.items()}, directory / "model.safetensors")
    loaded = load_model(directory)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_remembered_positions_of_old_files_do_no_harm(directory: Path, model: Family) -> None:
    state = load_file(directory / "model.safetensors")
    state[f"{model}.vision_model.embeddings.position_ids"] = torch.arange(37)[None]
    state[f"{model}.text_model.embeddings.position_ids"] = torch.arange(48)[None]
    save_file(state, directory / "model.safetensors")
    check_weights(directory, model)
    assert load_model(directory).num_patches_height == 6


def test_other_tensors_are_named(directory: Path, model: Family) -> None:
    state = load_file(directory / "model.safetensors")
    state["stranger"] = torch.zeros(2)
    state["class_head.dense0.bias"] = torch.zeros(7)
    del state["box_head.dense0.weight"]
    save_file(state, directory / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        check_weights(directory, model)
    for words in ("1 missing: box_head.dense0.weight", "1 unexpected: stranger (2,)", "class_head.dense0.bias (7,)"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", None, "cannot read config.json"),
        ("config.json", b"{", "not valid JSON"),
        ("config.json", b'{"model_type": "clip"}', "describes a 'clip' model"),
        ("config.json", b"[]", "describes a None model"),
        ("model.safetensors", None, "holds no model.safetensors"),
        ("model.safetensors", b"x", "not a safetensors file"),
        ("tokenizer.json", None, "holds no tokenizer"),
    ],
)
def test_damaged_directories_are_refused(
    directory: Path, model: Family, name: str, content: bytes | None, words: str
) -> None:
    if content is None:
        (directory / name).unlink()
    else:
        (directory / name).write_bytes(content)
    with pytest.raises(WeightsError, match=words):
        check_weights(directory, model)


def test_the_other_family_is_refused_with_the_setting(directory: Path, model: Family) -> None:
    other: Family = "owlvit" if model == "owlv2" else "owlv2"
    words = f"holds an {model} model, and detector.model is {other}: set `detector.model: {model}`"
    with pytest.raises(WeightsError, match=words):
        check_weights(directory, other)


def test_pickled_weights_are_not_loaded(directory: Path, model: Family) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"it may hold code: convert it once with Owl.*ForObjectDetection"):
        check_weights(directory, model)


def test_ready_queries_have_length_one_and_nothing_stays_nothing() -> None:
    queries = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    torch.testing.assert_close(ready(queries), torch.tensor([[0.6, 0.8], [0.0, 0.0]]), rtol=0, atol=1e-6)
