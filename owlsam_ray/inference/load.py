"""Open an engine: load a run's models onto this process's device and start the threads."""

import torch

from owlsam_ray.config.run import RunConfig
from owlsam_ray.inference.engine import Engine
from owlsam_ray.inference.queries import EmbeddedQueries
from owlsam_ray.inference.suppress import label_thresholds
from owlsam_ray.inference.work_items import EngineSettings
from owlsam_ray.models.arithmetic import fix_arithmetic
from owlsam_ray.models.load import load_detector, load_segmenter
from owlsam_ray.models.weights import ModelPaths
from owlsam_ray.parallel.allocation import Allocation
from owlsam_ray.parallel.work_slots import WorkSlots


def open_engine(
    config: RunConfig,
    allocation: Allocation,
    *,
    models: ModelPaths,
    queries: EmbeddedQueries,
    slots: WorkSlots | None = None,
) -> Engine:
    """Fix the arithmetic of this process, load both models onto one device and start an engine.

    Torch keeps the arithmetic when the engine is closed; `models.arithmetic.restored_arithmetic` restores it.

    Args:
        config: the run's config.
        allocation: device, batch sizes and threads of this process.
        models: paths of the weights.
        queries: what to look for.
        slots: records what the threads are working on, for a watchdog.

    Raises:
        WeightsError: the weights do not match the models.
        InputError: a threshold names a category that the vocabulary does not have.
    """
    vocabulary = queries.vocabulary
    thresholds = label_thresholds(config.suppress, vocabulary.category_names)
    fix_arithmetic(allocation.torch_threads)
    device = torch.device(allocation.device)
    dtype = torch.bfloat16 if config.resources.dtype == "bf16" else torch.float32
    return Engine(
        load_detector(config.detector, models.detector, device=device, dtype=dtype, fakes=config.fakes),
        load_segmenter(config.segment, models.segmenter, device=device, dtype=dtype),
        query_embeddings=queries.embeddings,
        query_labels=vocabulary.query_labels,
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
        slots=slots,
    )
