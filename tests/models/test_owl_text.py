"""The text tower against the installed transformers, and prompts against CLIP's reference tokens."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import OwlViTForObjectDetection

from owlsam_ray.config.vocabulary import VocabularyConfig
from owlsam_ray.errors import InputError
from owlsam_ray.models import owl_text
from owlsam_ray.models.owl_text import embed_texts, tokenize
from owlsam_ray.models.owl_weights import OwlModel, load_tokenizer
from owlsam_ray.vocabulary import resolve_vocabulary
from owlsam_ray.vocabulary.canonical import canonical
from owlsam_ray.vocabulary.templates import TEMPLATES, fill
from tests.seeded_owlvit import TINY_POSITIONS, full_tokenizer, write_tiny


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("owlvit")
    write_tiny(path, seed=3)
    return path


def official(directory: Path, prompts: list[str]) -> Tensor:
    """Text embeddings as transformers' own model hands them to its class head."""
    model = OwlViTForObjectDetection.from_pretrained(directory).eval()
    inputs = load_tokenizer(directory)(prompts, padding="max_length", return_tensors="pt")
    with torch.inference_mode():
        pixels = torch.zeros(1, 3, *[model.config.vision_config.image_size] * 2)
        outputs = model(**inputs, pixel_values=pixels)
    embeddings: Tensor = outputs.text_embeds[0]
    return embeddings


# Tokens


def test_tokens_equal_the_reference(shared: Path) -> None:
    """Of all 1648 names: bare, in a photo, and canonical in the seven templates."""
    datasets = json.loads((shared / "data" / "clip_bpe" / "reference_tokens.json").read_text())
    tokenizer = full_tokenizer(shared)
    entries = [entry for entries in datasets.values() for entry in entries]
    assert len(entries) == 80 + 1203 + 365
    for entry in entries:
        name = entry["name"]
        best7 = [canonical(prompt) for prompt in fill("clip_best7", name)]
        prompts = [*fill("none", name), *fill("photo", name), *best7]
        expected = [entry["raw"], entry["photo"], *entry["best7"]]
        ids, mask = tokenize(tokenizer, prompts, 24)  # four of them have more than 16
        assert [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)] == expected
        assert set(ids[mask == 0].tolist()) <= {tokenizer.pad_token_id}


@pytest.mark.parametrize("templates", sorted(TEMPLATES))
def test_every_canonical_lvis_prompt_fits(shared: Path, templates: str) -> None:
    entries = json.loads((shared / "data" / "lvis" / "lvis_v1_categories.json").read_text())
    settings = {"templates": templates, "canonical": True, "synonyms": True}
    queries = resolve_vocabulary(VocabularyConfig.model_validate(settings), entries).queries
    ids, mask = tokenize(full_tokenizer(shared), [prompt for query in queries for prompt in query.prompts], 16)
    assert ids.shape == mask.shape == (1826 * len(TEMPLATES[templates]), 16)


@pytest.mark.parametrize(("categories", "number"), [("coco", 80), ("lvis", 1203), ("objects365", 365)])
def test_every_builtin_prompt_fits_as_it_is_asked(shared: Path, categories: str, number: int) -> None:
    settings = VocabularyConfig.model_validate({"categories": categories, "templates": "photo"})
    prompts = [prompt for query in resolve_vocabulary(settings, []).queries for prompt in query.prompts]
    ids, _ = tokenize(full_tokenizer(shared), prompts, 16)
    assert ids.shape == (number, 16)


def test_lvis_names_that_are_too_long_are_refused(shared: Path) -> None:
    entries = json.loads((shared / "data" / "lvis" / "lvis_v1_categories.json").read_text())
    tokenizer, refused = full_tokenizer(shared), []
    for query in resolve_vocabulary(VocabularyConfig(templates="photo"), entries).queries:
        try:
            tokenize(tokenizer, query.prompts, 16)
        except InputError:
            refused.append(entries[query.label]["name"])
    assert refused == [
        "railcar_(part_of_a_train)",
        "monitor_(computer_equipment) computer_monitor",
        "passenger_car_(part_of_a_train)",
        "peeler_(tool_for_fruit_and_vegetables)",
    ]


def test_a_prompt_that_is_too_long_is_never_cut(directory: Path) -> None:
    fits = "x" * (TINY_POSITIONS - 2)  # a letter is a token
    assert len(embed_texts(directory, [fits])) == 1
    with pytest.raises(InputError) as caught:
        embed_texts(directory, ["a cat", fits + "x"])
    assert f"the prompt '{fits}x' has 49 tokens with start and end, and the text encoder takes at most 48" in str(
        caught.value
    )
    assert "shorten the name or synonym that it comes from; vocabulary.canonical: true" in str(caught.value)
    with pytest.raises(InputError, match=r"takes at most 4: take a short word$"):
        tokenize(load_tokenizer(directory), ["cats"], 4, way_out="take a short word")


# Embeddings


def test_embeddings_equal_transformers(directory: Path) -> None:
    prompts = ["a cat", "a photo of a traffic light", "", "x" * (TINY_POSITIONS - 2), "Hütte 猫"]
    found = embed_texts(directory, prompts)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, official(directory, prompts), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(prompts)))


def test_many_prompts_and_repeated_ones(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one call takes, in any order, each text once."""
    embedded = []
    forward = owl_text._forward

    def counted(model: OwlModel, ids: Tensor, mask: Tensor) -> Tensor:
        embedded.append(len(ids))
        return forward(model, ids, mask)

    monkeypatch.setattr(owl_text, "_forward", counted)
    distinct = [f"thing {number}" for number in range(130)]
    prompts = [*distinct, *reversed(distinct), distinct[5]]
    found = embed_texts(directory, prompts)
    assert embedded == [64, 64, 2]
    assert torch.equal(found[130:260], found[:130].flip(0))
    assert torch.equal(found[260], found[5])
    for position in (0, 64, 129):
        alone = embed_texts(directory, [prompts[position]])[0]
        torch.testing.assert_close(alone, found[position], rtol=0, atol=1e-6)
    assert len({tuple(row.tolist()) for row in found[:130]}) == 130


def test_no_prompt(directory: Path) -> None:
    assert embed_texts(directory, []).shape == (0, 32)
