"""A detector from nothing: its tokenizer, and a start that trains."""

import pytest
import torch

from owlsam_ray.finetune.scratch import OwlVitArchitecture, _cosines, build_owlvit, word_tokenizer
from owlsam_ray.sources.drawing import CATEGORIES

SMALL = OwlVitArchitecture(image_size=96, patch_size=16, width=48, layers=2, heads=3, text_width=32)


def test_every_word_is_one_token_and_others_fall_apart() -> None:
    words = [word for category in CATEGORIES for word in category.name.split()]
    tokenizer = word_tokenizer(words, positions=16)
    for category in CATEGORIES:
        assert len(tokenizer(category.name)["input_ids"]) == 4  # start, colour, shape, end
    ids = tokenizer("red elephant")["input_ids"]
    assert len(ids) > 5
    assert tokenizer.unk_token_id not in ids[1:-1] or tokenizer.unk_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(ids[1:-1]).strip() == "red elephant"


@pytest.mark.parametrize(
    "words",
    [["red", "green", "greed", "re"], ["aab", "ab", "b"], ["ring", "string", "in", "ringing"]],
    ids=["prefixes", "suffixes", "parts"],
)
def test_words_that_share_letters_stay_whole(words: list[str]) -> None:
    tokenizer = word_tokenizer(words, positions=8)
    for word in words:
        assert len(tokenizer(word)["input_ids"]) == 3


def test_end_has_the_highest_number() -> None:
    """transformers' text tower takes the place of the highest token id as the end of the prompt."""
    tokenizer = word_tokenizer(["red"], positions=8)
    assert tokenizer.eos_token_id == len(tokenizer) - 1


def test_equal_seeds_give_equal_weights_and_leave_the_global_state() -> None:
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first, second, other = (build_owlvit(SMALL, ["red", "ring"], seed=seed)[0].state_dict() for seed in (4, 4, 5))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@torch.no_grad()
def test_the_start_is_sane() -> None:
    model, tokenizer, _ = build_owlvit(SMALL, ["red", "ring"], seed=0)
    tokens = tokenizer(["red ring"], padding="max_length", max_length=16, return_tensors="pt")
    outputs = model.eval()(pixel_values=torch.randn(2, 3, 96, 96), **{k: v.repeat(2, 1) for k, v in tokens.items()})
    scores, boxes = outputs.logits.sigmoid(), outputs.pred_boxes
    assert 0.001 < float(scores.mean()) < 0.05
    # Boxes start as their patch: a grid of six, except for the last row and column, whose bias is at the border.
    inner = boxes.reshape(2, 6, 6, 4)[:, :5, :5]
    assert float((inner[..., 2:] - 1 / 6).abs().max()) < 0.05
    assert float((inner[0, 2, 3, :2] - torch.tensor([4 / 6, 3 / 6])).abs().max()) < 0.05


def test_patch_filters_are_orthogonal_waves() -> None:
    filters = _cosines(8, 60).flatten(1)
    product = filters @ filters.T
    assert float((product - torch.diag(product.diagonal())).abs().max()) < 1e-5
