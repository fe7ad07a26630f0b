"""A training as a Ray Train job: the same loop in one process or many, on CPUs or GPUs."""

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
from ray.train.torch import TorchConfig, TorchTrainer

from owlsam_ray import storage
from owlsam_ray.config import absolute
from owlsam_ray.demo.dataset import annotation_file, image_root, write_split
from owlsam_ray.demo.drawing import Split
from owlsam_ray.errors import ConfigError, IncompleteError, InterruptedRunError, OwlsamError, PreflightError
from owlsam_ray.finetune.batches import SampleReader
from owlsam_ray.finetune.config import DatasetFiles, FinetuneConfig
from owlsam_ray.finetune.data import TrainingImages, read_training_images
from owlsam_ray.finetune.detector import DetectorTask
from owlsam_ray.finetune.loop import Worker, train
from owlsam_ray.finetune.provenance import library_versions
from owlsam_ray.finetune.segmenter import SegmenterTask
from owlsam_ray.finetune.store import MODEL, TrainingStore
from owlsam_ray.finetune.task import Task
from owlsam_ray.pipeline import start_ray

_log = logging.getLogger(__name__)


def finetune(config: FinetuneConfig, *, report: Callable[[dict[str, Any]], None] = lambda _: None) -> dict[str, Any]:
    """Run a training to its end; the same call again resumes.

    Args:
        config: of the training.
        report: called with every line of metrics, here in the driver.

    Returns:
        Steps, last loss, best validation, where the model is, and what cleaning removed.

    Raises:
        OwlsamError: see `errors` for the kinds and their exit codes.
    """
    if config.out is None:
        raise ConfigError("no directory for the training: set `out:` in its file, or give --out DIR")
    if config.out.startswith("memory:"):
        raise PreflightError(f"{config.out} lives in one process, and Ray's workers are others: use a disk or a bucket")
    store = TrainingStore(config.out)
    training, _ = open_data(config)  # here first: what is wrong with the data is told before Ray starts
    make_task(config, training)
    store.guard(
        {
            "config": config.result_fields(),
            "categories": [category.name for category in training.categories],
            "cleaning": training.report.as_dict(),
            "versions": library_versions(),
        }
    )
    _log.info("%s", training.report.summary())
    with _ray(config), _tell_metrics(store, report, config.logging.progress_s):
        result = _fit_again(config)
    return result | {"model": storage.join(config.out, MODEL), "cleaning": training.report.as_dict()}


def open_data(config: FinetuneConfig) -> tuple[TrainingImages, TrainingImages | None]:
    """Training and validation set, cleaned; the drawn one is drawn first when it is not there."""
    data = config.data
    train_files, val_files = data.train, data.val
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
    if train_files is None:
        raise ConfigError("data names no training set")
    training = read_training_images(train_files.annotations, train_files.images, config.cleaning)
    if val_files is None:
        return training, None
    validation = read_training_images(val_files.annotations, val_files.images, config.cleaning)
    theirs, ours = ([category.name for category in images.categories] for images in (validation, training))
    if theirs != ours:
        raise ConfigError(
            f"{val_files.annotations} has other categories than {train_files.annotations} "
            f"({sorted(set(theirs) ^ set(ours))[:5]} …): validation needs the same list in the same order"
        )
    return training, validation


def make_task(config: FinetuneConfig, training: TrainingImages) -> Task:
    """The model that the config names, ready to train."""
    seed = config.optimizer.seed
    if config.detector is not None:
        return DetectorTask(config.detector, training.categories, seed=seed)
    if config.segmenter is not None:
        return SegmenterTask(config.segmenter, seed=seed)
    raise ConfigError("a training needs either a section detector or a section segmenter")


def _fit_again(config: FinetuneConfig) -> dict[str, Any]:
    """`_fit`, again from the last checkpoint when workers were lost; what would only happen again is told at once."""
    for left in range(config.resources.max_failures, -1, -1):
        try:
            return _fit(config)
        except ray.train.TrainingFailedError as error:
            told = _told(error)
            if left == 0 or not isinstance(told, IncompleteError):
                raise told from error
            _log.warning("%s", told)
    raise AssertionError


def _fit(config: FinetuneConfig) -> dict[str, Any]:
    """Hand the training to Ray Train, and give back what its first worker reported last."""
    resources = config.resources
    gpus = ray.cluster_resources().get("GPU", 0.0)
    if resources.device == "cuda" and gpus < resources.workers:
        raise PreflightError(f"{resources.workers} worker(s) on cuda, but Ray sees {gpus:g} GPUs: use device: cpu")
    on_gpu = resources.device == "cuda" or (resources.device == "auto" and gpus >= resources.workers)
    cpus = resources.cpus_per_worker
    total = ray.cluster_resources().get("CPU", 0.0)
    if cpus == "auto":
        cpus = 4.0 if on_gpu else max(0.5, float(int(total / resources.workers)))
    if cpus * resources.workers > total + 1e-6:
        raise PreflightError(
            f"{resources.workers} worker(s) × {cpus:g} CPUs need {cpus * resources.workers:g} CPUs, but Ray has "
            f"{total:g}: lower resources.workers or resources.cpus_per_worker"
        )
    with tempfile.TemporaryDirectory(prefix="owlsam-train-") as scratch:
        trainer = TorchTrainer(
            _work,
            train_loop_config={"config": config, "device": "cuda" if on_gpu else "cpu", "cpus": cpus},
            torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=resources.workers,
                use_gpu=on_gpu,
                resources_per_worker={"CPU": cpus} | ({"GPU": 1} if on_gpu else {}),
            ),
            run_config=ray.train.RunConfig(
                name="train",
                # Ray's own bookkeeping; checkpoints are ours. Workers on other nodes need a place that they share.
                storage_path=scratch if resources.ray_address is None else storage.join(config.out or "", "ray"),
            ),
        )
        return dict(trainer.fit().metrics or {})


def _work(arguments: dict[str, Any]) -> None:
    """One worker."""
    config: FinetuneConfig = arguments["config"]
    logging.getLogger("owlsam_ray").setLevel(config.logging.level.upper())
    logging.getLogger("owlsam_ray").addHandler(logging.StreamHandler())  # to Ray's log of this worker
    context = ray.train.get_context()
    if arguments["device"] == "cuda":
        worker = Worker(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    else:
        worker = Worker(context.get_world_rank(), context.get_world_size(), torch.device("cpu"))
        threads = config.resources.torch_threads
        torch.set_num_threads(max(1, int(arguments["cpus"])) if threads == "auto" else threads)
    training, validation = open_data(config)
    task = make_task(config, training)
    cache = config.data.cache_mb
    summary = train(
        task,
        config,
        SampleReader(training, masks=task.needs_masks, cache_mb=cache),
        None if validation is None else SampleReader(validation, masks=task.needs_masks),
        worker=worker,
        store=TrainingStore(config.out or ""),
    )
    ray.train.report(summary)


def _told(error: BaseException) -> OwlsamError:
    """Our own error out of Ray's wrappers, where there is one."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, OwlsamError):
                return cause
            cause = getattr(cause, "cause", None) or cause.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return IncompleteError(f"the training broke off ({lines[-1]}); the same command goes on at the last checkpoint")


@contextlib.contextmanager
def _ray(config: FinetuneConfig) -> Iterator[None]:
    """Ray for the time of a training; SIGTERM ends it as Ctrl-C does."""
    try:
        ours = start_ray(config.resources, level=config.logging.level)
    except SystemExit:
        raise InterruptedRunError("interrupted while Ray was starting; call the same command again") from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise IncompleteError(f"Ray does not start: {error}") from error
    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(
            "interrupted: the same command goes on at the last checkpoint (every checkpoint.every steps)"
        ) from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
        if ours:
            ray.shutdown()


@contextlib.contextmanager
def _tell_metrics(store: TrainingStore, report: Callable[[dict[str, Any]], None], interval_s: float) -> Iterator[None]:
    """Pass on the lines that the first worker writes, as they come."""
    stop = threading.Event()
    told = len(store.read_metrics())

    def look() -> None:
        nonlocal told
        with contextlib.suppress(OSError, ValueError):
            lines = store.read_metrics()
            told = min(told, len(lines))  # a resumed training cuts off what it does again
            for line in lines[told:]:
                report(line)
            told = len(lines)

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
