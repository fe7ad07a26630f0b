"""Run the text encoder: prompts → embeddings, once per run.

Shapes: T prompts, L tokens that the text encoder takes, D channels of a query.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from owlsam_ray.errors import InputError, WeightsError, shown
from owlsam_ray.models.owl_weights import OwlModel, backbone, load_config, load_model, load_tokenizer

WAY_OUT = (
    "shorten the name or synonym that it comes from; vocabulary.canonical: true and vocabulary.templates: none make "
    "prompts shorter"
)
_PROMPTS_PER_CALL = 64


def tokenize(tokenizer: Any, prompts: Sequence[str], limit: int, *, way_out: str = WAY_OUT) -> tuple[Tensor, Tensor]:
    """Tokenize prompts for the text encoder.

    Args:
        tokenizer: CLIP's tokenizer.
        prompts: T texts.
        limit: L, including start and end.
        way_out: suggestion in the message for a prompt that is too long.

    Returns:
        ids: (T, L) int64, filled up with the tokenizer's padding.
        mask: (T, L) int64, 1 for tokens, 0 for padding.

    Raises:
        InputError: a prompt has more than L tokens; prompts are never truncated.
    """
    ids = torch.full((len(prompts), limit), tokenizer.pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        tokens = tokenizer(prompt, verbose=False)["input_ids"]  # its own warning would announce an indexing error
        if len(tokens) > limit:
            raise InputError(
                f"the prompt {shown(prompt)} has {len(tokens)} tokens with start and end, and the text encoder takes "
                f"at most {limit}: {way_out}"
            )
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return ids, mask


def embed_texts(path: Path, prompts: Sequence[str], *, device: torch.device | None = None) -> Tensor:
    """Run the text encoder once on every distinct prompt.

    Args:
        path: a directory in Hugging Face layout.
        prompts: T texts.
        device: where to run; default: the CPU.

    Returns:
        (T, D) float32 on the CPU, each of length 1, in the order of `prompts`.

    Raises:
        InputError: a prompt has more tokens than the text encoder takes; prompts are never truncated.
        WeightsError: there is no readable `config.json`, or the tokenizer is damaged or belongs to another model.
    """
    rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    config = load_config(path)
    ids, mask = tokenize(load_tokenizer(path), list(rows), config.text_config.max_position_embeddings)
    if ids.numel() and int(ids.max()) >= config.text_config.vocab_size:
        raise WeightsError(
            f"the tokenizer of {path} gives the token {int(ids.max())}, and the model knows only "
            f"{config.text_config.vocab_size} tokens: use the tokenizer that came with the model"
        )
    model = load_model(path).eval().to(device or torch.device("cpu"))
    distinct = [
        _forward(model, ids[start : start + _PROMPTS_PER_CALL], mask[start : start + _PROMPTS_PER_CALL])
        for start in range(0, len(ids), _PROMPTS_PER_CALL)
    ]
    embeddings = torch.cat([torch.zeros(0, config.projection_dim), *distinct])
    return embeddings[torch.tensor([rows[prompt] for prompt in prompts], dtype=torch.int64)]


@torch.inference_mode()
def _forward(model: OwlModel, ids: Tensor, mask: Tensor) -> Tensor:
    """(T, L) ids and mask to (T, D) float32: the only place that calls the text encoder for inference."""
    towers: Any = backbone(model)
    device = towers.text_projection.weight.device
    pooled = towers.text_model(input_ids=ids.to(device), attention_mask=mask.to(device)).pooler_output
    projected = towers.text_projection(pooled).float()
    return (projected / torch.linalg.norm(projected, dim=-1, keepdim=True)).cpu()
