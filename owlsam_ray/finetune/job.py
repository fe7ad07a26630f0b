"""Run a training as a Ray Train job: the same loop in one process or many, on CPUs or GPUs."""

import contextlib
import logging
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.exceptions import RayError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import PreemptionError

from owlsam_ray import storage
from owlsam_ray.config.load import absolute
from owlsam_ray.errors import ConfigError, IncompleteError, InterruptedRunError, OwlsamError, PreflightError
from owlsam_ray.finetune.batches import SampleReader
from owlsam_ray.finetune.config import DatasetFiles, FinetuneConfig
from owlsam_ray.finetune.data import TrainingImages, read_training_images
from owlsam_ray.finetune.detector import DetectorTask
from owlsam_ray.finetune.loop import Worker, train
from owlsam_ray.finetune.process_group import LocalTorchConfig
from owlsam_ray.finetune.provenance import annotations_sha256, library_versions
from owlsam_ray.finetune.segmenter import SegmenterTask
from owlsam_ray.finetune.store import MODEL, TrainingStore
from owlsam_ray.finetune.task import Task
from owlsam_ray.parallel.logs import stderr_handler
from owlsam_ray.parallel.lost_ray import SUFFIX, LossCount
from owlsam_ray.parallel.ray_cluster import start_ray, stop_ray
from owlsam_ray.parallel.ray_watch import watch_ray
from owlsam_ray.parallel.signals import interrupt
from owlsam_ray.sources.drawing import Split
from owlsam_ray.sources.drawn import annotation_file, image_root, write_split
from owlsam_ray.storage.arrow_types import forget_ray_types

forget_ray_types()  # ray.train imports ray.data

_log = logging.getLogger(__name__)

_PATIENCE_S = 4 * 3600
"""How long workers wait for the first one while it validates."""
_ADVICE = "Usually memory is short: give the job more, or lower resources.workers or data.cache_mb."


def finetune(config: FinetuneConfig, *, report: Callable[[dict[str, Any]], None] = lambda _: None) -> dict[str, Any]:
    """Run a training to its end; the same call again resumes it.

    Args:
        config: configuration of the training.
        report: called in the driver with every line of metrics.

    Returns:
        Steps, last loss, best validation, location of the model, and what cleaning removed.

    Raises:
        OwlsamError: see `errors` for the kinds and their exit codes.
    """
    if config.out is None:
        raise ConfigError("no output directory: set `out:` in the job file, or give --out DIR")
    if config.out.startswith("memory:"):
        raise PreflightError(f"{config.out} exists only in this process, not in Ray's workers: use a disk or a bucket")
    store = TrainingStore(config.out)
    cleaning = _check(config, store)
    kept = store.checkpoints()
    # Steps after the last checkpoint are repeated, so their lines are dropped.
    store.write_metrics([line for line in store.read_metrics() if kept and line["step"] <= kept[-1]])
    losses = LossCount(
        storage.join(config.out, f"finetune{SUFFIX}"),
        progress=lambda: max(store.checkpoints(), default=0),
        state=lambda: f"the last checkpoint is of step {max(store.checkpoints(), default=0)}",
    )
    with _ray(config, losses), _reported_metrics(store, report, config.logging.progress_s):
        _fit_again(config)
    finished: dict[str, Any] = next((line for line in reversed(store.read_metrics()) if line.get("finished")), {})
    summary = {name: value for name, value in finished.items() if name not in ("step", "finished")}
    return summary | {"model": storage.join(config.out, MODEL), "cleaning": cleaning}


def _check(config: FinetuneConfig, store: TrainingStore) -> dict[str, Any]:
    """Report problems of data, model or directory before Ray starts; returns what cleaning removed."""
    training, _ = open_data(config)
    make_task(config, training)  # raises its errors early
    _log.info("%s", training.report.summary())
    sets = zip(("train", "val"), _files(config), strict=True)
    store.guard(
        {
            "config": config.result_fields(),
            "categories": [category.name for category in training.categories],
            "data_sha256": {name: annotations_sha256(files.annotations) for name, files in sets if files is not None},
            "cleaning": training.report.as_dict(),
            "versions": library_versions(),
        }
    )
    return training.report.as_dict()


def _files(config: FinetuneConfig) -> tuple[DatasetFiles, DatasetFiles | None]:
    """Location of the training and the validation set; the drawn set is drawn first if it does not exist."""
    data = config.data
    if data.drawn is not None:
        directory = Path(data.drawn.directory)
        for split, count in ((Split.TRAIN, data.drawn.train), (Split.VAL, data.drawn.val)):
            write_split(directory, split, count, seed=data.drawn.seed)
        train_files, val_files = (
            DatasetFiles(
                annotations=absolute(str(annotation_file(directory, split))), images=str(image_root(directory))
            )
            for split in (Split.TRAIN, Split.VAL)
        )
        return train_files, val_files
    if data.train is None:
        raise ConfigError("data names no training set")
    return data.train, data.val


def open_data(config: FinetuneConfig) -> tuple[TrainingImages, TrainingImages | None]:
    """Open the training and validation set, cleaned.

    Small objects and images without objects stay in the validation set: detecting the former is not wrong, detecting
    anything on the latter is.
    """
    train_files, val_files = _files(config)
    options: dict[str, Any] = {"masks": config.segmenter is not None, "max_pixels": config.data.max_pixels}
    training = read_training_images(train_files.annotations, train_files.images, config.cleaning, **options)
    if val_files is None:
        return training, None
    cleaning = config.cleaning.model_copy(update={"min_area": 0.0, "drop_empty_images": False})
    validation = read_training_images(val_files.annotations, val_files.images, cleaning, **options)
    theirs, ours = ([category.name for category in images.categories] for images in (validation, training))
    if theirs != ours:
        raise ConfigError(
            f"{val_files.annotations} has other categories than {train_files.annotations} "
            f"({sorted(set(theirs) ^ set(ours))[:5]} …): validation needs the same list in the same order"
        )
    return training, validation


def make_task(config: FinetuneConfig, training: TrainingImages) -> Task:
    """Build the model that the configuration names, ready to train.

    Raises:
        ConfigError: nothing in it is trained.
        WeightsError, InputError: see the tasks.
    """
    seed = config.optimizer.seed
    task: Task
    if config.detector is not None:
        task = DetectorTask(config.detector, training.categories, seed=seed)
    elif config.segmenter is not None:
        task = SegmenterTask(config.segmenter, seed=seed)
    else:
        raise ConfigError("a training needs either a section `detector` or a section `segmenter`")
    if not any(parameter.requires_grad for parameter in task.module.parameters()):
        raise ConfigError("every part of the model is frozen: leave out one of detector.frozen")
    return task


def _fit_again(config: FinetuneConfig) -> None:
    """Call `_fit`, again from the last checkpoint if workers were lost; errors that would recur are raised at once."""
    for left in range(config.resources.max_failures, -1, -1):
        try:
            return _fit(config)
        except ray.train.TrainingFailedError as error:
            cause, lost = _own_error(error)
            if left == 0 or not lost:
                raise cause from error
            _log.warning("%s", cause)


def _fit(config: FinetuneConfig) -> None:
    """Submit the training to Ray Train and wait for its end."""
    resources = config.resources
    on_gpu, cpus = _share(config, ray.cluster_resources())
    _log.info("%d worker(s) on %s, %g CPUs each", resources.workers, "cuda" if on_gpu else "cpu", cpus)
    torch_settings: dict[str, Any] = {"backend": "nccl" if on_gpu else "gloo", "timeout_s": _PATIENCE_S}
    elsewhere = resources.ray_address is not None
    with tempfile.TemporaryDirectory(prefix="owlsam-train-") as scratch:
        trainer = TorchTrainer(
            _work,
            train_loop_config={"config": config, "device": "cuda" if on_gpu else "cpu", "cpus": cpus},
            torch_config=TorchConfig(**torch_settings)
            if elsewhere
            else LocalTorchConfig(folder=scratch, **torch_settings),
            scaling_config=ray.train.ScalingConfig(
                num_workers=resources.workers,
                use_gpu=on_gpu,
                resources_per_worker={"CPU": cpus} | ({"GPU": 1} if on_gpu else {}),
            ),
            run_config=ray.train.RunConfig(
                name="train",
                # For Ray's own bookkeeping only: checkpoints are ours. Workers on other nodes need a place that they
                # share.
                storage_path=storage.join(config.out or "", "ray") if elsewhere else scratch,
            ),
        )
        trainer.fit()


def _share(config: FinetuneConfig, totals: dict[str, float]) -> tuple[bool, float]:
    """Whether to train on GPUs, and the CPUs of a worker.

    Raises:
        PreflightError: the workers do not fit.
    """
    resources, gpus, total = config.resources, totals.get("GPU", 0.0), totals.get("CPU", 0.0)
    few = gpus < resources.workers
    if few and (resources.device == "cuda" or (resources.device == "auto" and gpus > 0)):
        raise PreflightError(
            f"{resources.workers} worker(s), one GPU each, but Ray sees {gpus:g} GPU(s): lower resources.workers, or "
            "set resources.device to cpu"
        )
    on_gpu = resources.device != "cpu" and gpus > 0
    share = max(0.5, float(int(total / resources.workers)))
    wanted = resources.cpus_per_worker
    cpus = float(wanted) if wanted != "auto" else min(4.0, share) if on_gpu else share
    if cpus * resources.workers > total + 1e-6:
        raise PreflightError(
            f"{resources.workers} worker(s) × {cpus:g} CPUs need {cpus * resources.workers:g} CPUs, but Ray has "
            f"{total:g}: lower resources.workers or resources.cpus_per_worker"
        )
    return on_gpu, cpus


def _work(arguments: dict[str, Any]) -> None:
    """Run one worker."""
    config: FinetuneConfig = arguments["config"]
    logging.getLogger("owlsam_ray").setLevel(config.logging.level.upper())
    logging.getLogger("owlsam_ray").addHandler(stderr_handler())  # to Ray's log of this worker
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    if arguments["device"] == "cuda":
        device = ray.train.torch.get_device()
        torch.set_num_threads(1)  # one for each loader thread
    else:
        device = torch.device("cpu")
        threads = config.resources.torch_threads
        torch.set_num_threads(max(1, int(arguments["cpus"])) if threads == "auto" else threads)
    training, validation = open_data(config)
    task = make_task(config, training)
    cache = config.data.cache_mb
    train(
        task,
        config,
        SampleReader(training, masks=task.needs_masks, cache_mb=cache),
        None if validation is None else SampleReader(validation, masks=task.needs_masks, split="validation"),
        worker=Worker(rank, world_size, device),
        store=TrainingStore(config.out or ""),
    )


def _own_error(error: BaseException) -> tuple[OwlsamError, bool]:
    """Extract our own error from Ray's wrappers, if there is one, and say whether a worker was merely lost."""
    failures = list((getattr(error, "worker_failures", None) or {}).values())
    for failure in failures:
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, OwlsamError):
                return cause, False
            cause = getattr(cause, "cause", None) or cause.__cause__
    # When one worker is lost, the others report a broken connection.
    lost = isinstance(error, PreemptionError) or any(isinstance(failure, RayError) for failure in failures)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    failed = IncompleteError(f"the training failed ({lines[-1]}); the same command continues from the last checkpoint")
    return failed, lost


@contextlib.contextmanager
def _ray(config: FinetuneConfig, losses: LossCount) -> Iterator[None]:
    """Start Ray for the duration of a training; SIGTERM ends it as Ctrl-C does."""
    try:
        ours = start_ray(config.resources, level=config.logging.level)
    except SystemExit:
        raise InterruptedRunError("interrupted while Ray was starting; run the same command again") from None
    in_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if in_main else ()
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        with watch_ray(lambda cause: losses.count(cause, advice=_ADVICE)):
            yield
    # While it works, Ray Train has its own SIGINT handler, which exits by `sys.exit(0)`.
    except (KeyboardInterrupt, SystemExit):
        raise InterruptedRunError(
            "interrupted: the same command continues from the last checkpoint (one every checkpoint.every steps)"
        ) from None
    finally:
        losses.clear()  # Ray stops here on purpose: not a loss
        for number, handler in before.items():
            signal.signal(number, handler)
        if ours:
            stop_ray()


@contextlib.contextmanager
def _reported_metrics(
    store: TrainingStore, report: Callable[[dict[str, Any]], None], interval_s: float
) -> Iterator[None]:
    """Report the lines that the first worker writes, as they appear."""
    stop = threading.Event()
    reported = store.read_metrics()

    def look() -> None:
        nonlocal reported
        with contextlib.suppress(OSError, ValueError):
            lines = store.read_metrics()
            # Workers that replace lost ones cut off the lines of steps that they repeat.
            pairs = enumerate(zip(reported, lines, strict=False))
            same = next((index for index, (old, new) in pairs if old != new), min(len(reported), len(lines)))
            for line in lines[same:]:
                report(line)
            reported = lines

    def watch() -> None:
        while not stop.wait(interval_s):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)
        look()
