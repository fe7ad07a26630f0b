"""Embed a run's queries for the detector; the driver does this once per run.

Shapes: Q queries, D channels of a query. Symbols: u is a text embedding of length 1, and r = u / (|u| + 1e-6) is its
normalisation in the class head of transformers, before the product with the image embeddings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from owlsam_ray import storage
from owlsam_ray.config.inference import DecodeConfig, DetectorConfig, Grey16
from owlsam_ray.config.run import RunConfig
from owlsam_ray.config.vocabulary import Exemplar
from owlsam_ray.errors import ImageError, InputError, shown
from owlsam_ray.inference.decode import decode_image
from owlsam_ray.vocabulary import Query, Vocabulary

_TENSOR = "queries"
"""Name of the tensor in a file of query embeddings."""


@dataclass(frozen=True, slots=True)
class EmbeddedQueries:
    """What an engine looks for: the vocabulary, and the embedding of each of its queries."""

    vocabulary: Vocabulary
    embeddings: Tensor
    """(Q, D) float32 on the CPU, in the order of the vocabulary's queries."""


def embed_vocabulary(vocabulary: Vocabulary, config: RunConfig, *, detector_weights: Path) -> EmbeddedQueries:
    """Embed all queries of a vocabulary with a run's settings.

    Raises:
        InputError, WeightsError: as `embed_queries`.
    """
    embeddings = embed_queries(
        vocabulary.queries,
        detector_weights=detector_weights,
        settings=config.detector,
        ensemble=config.vocabulary.ensemble,
        grey16=config.decode.grey16,
    )
    return EmbeddedQueries(vocabulary, embeddings)


def save_embeddings(url: str, queries: EmbeddedQueries) -> None:
    """Write the embeddings as a safetensors file.

    Raises:
        OSError: storage failed.
    """
    storage.write_atomic(url, safetensors.torch.save({_TENSOR: queries.embeddings.contiguous()}))


def load_embeddings(url: str, vocabulary: Vocabulary) -> EmbeddedQueries:
    """Read the file of `save_embeddings`; `vocabulary` is the one that was embedded.

    Raises:
        OSError: storage failed.
    """
    return EmbeddedQueries(vocabulary, safetensors.torch.load(storage.read_bytes(url))[_TENSOR])


def embed_queries(
    queries: Sequence[Query],
    *,
    detector_weights: Path,
    settings: DetectorConfig,
    ensemble: Literal["embeddings", "logits"],
    grey16: Grey16 = "full",
    device: torch.device | None = None,
) -> Tensor:
    """Run the text tower on all prompts, and the image tower and class head on all exemplars.

    A query with one prompt is r. With several prompts, `embeddings` is the mean of u, normalised in the same way as r;
    `logits` is the mean of r as it is, shorter than 1. The latter is exact: the class head's logit is
    (e · r + shift) · scale, where e, shift and scale depend on the box alone, so the mean of the logits of several r is
    the logit of the mean of r. It must not be normalised again, and `Owl.detect` does not.

    Args:
        queries: Q queries in the order of the vocabulary.
        detector_weights: a directory in Hugging Face layout.
        settings: settings of the detector that will use the queries; exemplars go through the same preprocessing.
        ensemble: how several prompts become one query.
        grey16: `decode.grey16` of the run, for exemplars.
        device: where to run; default: the CPU.

    Returns:
        (Q, D) float32 on the CPU, for `Detector.detect`.

    Raises:
        InputError: a prompt is too long; the image of an exemplar cannot be read; a box exceeds its image.
        WeightsError: the weights are incomplete or do not match the model.
    """
    # The model code is imported only if needed: transformers takes seconds to import, and a fake does not use it.
    if settings.model == "fake":
        from owlsam_ray.models.fakes import fake_query

        return torch.stack(
            [
                fake_query(query.prompts if query.exemplar is None else [str(index)])
                for index, query in enumerate(queries)
            ]
        )
    from owlsam_ray.models.owl_text import embed_texts

    device = device or torch.device("cpu")
    rows: dict[int, Tensor] = {}
    # Exemplars first, so that a wrong path is reported before a large vocabulary is embedded, which can take minutes.
    exemplars = {index: query.exemplar for index, query in enumerate(queries) if query.exemplar is not None}
    if exemplars:
        rows |= _embed_exemplars(exemplars, detector_weights, settings, grey16, device)
    texts = {index: query.prompts for index, query in enumerate(queries) if query.exemplar is None}
    if texts:
        units = embed_texts(
            detector_weights, [prompt for prompts in texts.values() for prompt in prompts], device=device
        )
        parts = units.split([len(prompts) for prompts in texts.values()])
        rows |= {index: _average(part, ensemble) for index, part in zip(texts, parts, strict=True)}
    return torch.stack([rows[index] for index in range(len(queries))])


def _embed_exemplars(
    exemplars: Mapping[int, Exemplar],
    weights: Path,
    settings: DetectorConfig,
    grey16: Grey16,
    device: torch.device,
) -> dict[int, Tensor]:
    """Compute the (D,) query of each exemplar; one image is in memory at a time, and the model only meanwhile."""
    from owlsam_ray.models.owl import Owl
    from owlsam_ray.models.owl_exemplars import exemplar_embedding
    from owlsam_ray.models.owl_weights import ready

    detector = Owl.load(weights, settings, device=device, dtype=torch.float32)
    rows = {
        index: ready(exemplar_embedding(detector, _read(exemplar, grey16), exemplar.box))
        for index, exemplar in exemplars.items()
    }
    del detector
    if device.type == "cuda":
        torch.cuda.empty_cache()  # release it for the actors, which are other processes
    return rows


def _average(units: Tensor, ensemble: Literal["embeddings", "logits"]) -> Tensor:
    """Average the (T, D) text embeddings of one query's prompts to (D,)."""
    from owlsam_ray.models.owl_weights import ready

    if len(units) == 1:
        return ready(units[0])
    return ready(units.mean(dim=0)) if ensemble == "embeddings" else ready(units).mean(dim=0)


def _read(exemplar: Exemplar, grey16: Grey16) -> NDArray[np.uint8]:
    """Read an exemplar's image as (H, W, 3) RGB, upright.

    Raises:
        InputError: it cannot be read, or the box exceeds it.
    """
    name = f"vocabulary.exemplars: the image {exemplar.image} of {shown(exemplar.category)}"
    try:
        data = storage.read_bytes(exemplar.image)
    except FileNotFoundError:
        raise InputError(f"{name} does not exist: a relative path counts from the working directory") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{name} cannot be read: {error}") from None
    try:
        pixels = decode_image(data, stated_hw=None, max_pixels=DecodeConfig().max_pixels, grey16=grey16).pixels
    except ImageError as error:
        raise InputError(f"{name} cannot be decoded: {error.reason}") from None
    if exemplar.box is not None:
        height, width, _ = pixels.shape
        x0, y0, x1, y1 = exemplar.box
        if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
            raise InputError(
                f"{name} has {width} x {height} pixels when upright, but its box {list(exemplar.box)} exceeds it: "
                "boxes are [x0, y0, x1, y1] in pixels"
            )
    return pixels
