"""Load a run's models and start an engine with its settings."""

from collections.abc import Sequence

import torch
from torch import Tensor

from owlsam_ray.config.run import RunConfig
from owlsam_ray.inference.engine import Engine
from owlsam_ray.inference.suppress import label_thresholds
from owlsam_ray.inference.work_items import EngineSettings
from owlsam_ray.models.load import load_detector, load_segmenter
from owlsam_ray.models.weights import ModelPaths
from owlsam_ray.parallel.allocation import Allocation
from owlsam_ray.parallel.work_slots import WorkSlots


def load_engine(
    config: RunConfig,
    allocation: Allocation,
    *,
    models: ModelPaths,
    query_embeddings: Tensor,
    query_labels: Sequence[int],
    category_names: Sequence[str],
    watch: WorkSlots | None = None,
) -> Engine:
    """Load both models onto one device and start an engine.

    Args:
        config: the run's config.
        allocation: device, batch sizes and threads of this process.
        models: paths of the weights.
        query_embeddings: (Q, D) float32.
        query_labels: category index of each query.
        category_names: the run's category names, for thresholds per category.
        watch: records what the threads are working on.

    Raises:
        WeightsError: the weights do not match the models.
        InputError: a threshold names a category that the run does not have.
    """
    thresholds = label_thresholds(config.suppress, category_names)
    device = torch.device(allocation.device)
    dtype = torch.bfloat16 if config.resources.dtype == "bf16" else torch.float32
    return Engine(
        load_detector(config.detector, models.detector, device=device, dtype=dtype, fakes=config.fakes),
        load_segmenter(config.segment, models.segmenter, device=device, dtype=dtype),
        query_embeddings=query_embeddings,
        query_labels=query_labels,
        settings=EngineSettings(
            decode=config.decode,
            detector=config.detector,
            tiling=config.tiling,
            suppress=config.suppress,
            segment=config.segment,
            detector_batch=allocation.detector_batch,
            segmenter_batch=allocation.segmenter_batch,
            decoder_batch=allocation.decoder_batch,
            threads=allocation.threads,
            label_thresholds=thresholds,
        ),
        watch=watch,
    )
