"""`owlsam demo`: label and evaluate drawn pictures with the models that come with the package.

All files are in one directory, which is also the run directory; the same call again resumes.
"""

import json
import logging
import math
import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from owlsam_ray import storage
from owlsam_ray.config.load import load_tree, validate_tree, with_absolute_paths
from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import ConfigError, GuardError
from owlsam_ray.models.shipped import check_shipped, model_settings
from owlsam_ray.parallel.allocation import export_ray_environment
from owlsam_ray.plan.plan import plan_run
from owlsam_ray.run.guard import check_writable
from owlsam_ray.run.paths import ANNOTATIONS, COCO_FOLDER, EVALUATION_FILE, RUN_FILE
from owlsam_ray.sources.drawing import Split
from owlsam_ray.sources.drawn import annotation_file, image_root, write_split
from owlsam_ray.terminal import SafeConsole

CONFIG_FILE, SHEET_FILE, PICTURES = "run.yaml", "contact_sheet.png", "drawn"
_SHEET_PICTURES, _SHEET_COLUMNS = 12, 4
_log = logging.getLogger(__name__)

_COMMENTS = {
    "data": "which images: a COCO file and its image root; for a directory of your own, `source: folder` and `images`",
    "vocabulary": "what to look for: the names in the COCO file; or a list of your own: [red car, dog]",
    "detector": "prompts to boxes: a low floor here, the real threshold is set at reduce",
    "suppress": "overlapping boxes of one label",
    "tiling": "large images in overlapping tiles",
    "segment": "boxes to masks",
    "resources": "where and how fast: two actors of one thread each on two CPUs; without it a run fills the machine",
    "reduce": "applied without a model, as often as you like",
    "evaluate": "how good the labels are",
    "logging": "log level and how often progress is shown",
}


def run_demo(
    directory: str, *, num_images: int, seed: int, overrides: Sequence[str], console: Console
) -> dict[str, Any]:
    """Draw pictures, label them with two actors, reduce and evaluate the labels, and draw them.

    The directory then holds `run.yaml`, `evaluation.json`, `contact_sheet.png` and all files of the run.

    Args:
        directory: local directory; created if it does not exist. An earlier demo in it must have the same pictures.
        num_images: number of pictures.
        seed: seed of the pictures; at least 0.
        overrides: settings as `section.field=value`, which override the run file.
        console: console for the progress, the table and the suggested next steps.

    Returns:
        Counts, paths, and the scores over all images.

    Raises:
        ConfigError: the directory is a URL, the number is not positive, the seed is negative, or an override is
            invalid.
        WeightsError: the package lacks its checkpoints.
        GuardError: the directory belongs to other pictures, other settings or another run.
        FailedImagesError: more images failed than `reduce.max_failed` allows; everything has been written regardless.
        OwlsamError: the same as for `annotate_run`, `reduce_run` and `evaluate_run`.
    """
    if "://" in directory:
        raise ConfigError(f"--run {directory}: the demo needs a directory on this machine")
    if num_images < 1 or seed < 0:
        raise ConfigError(f"--images {num_images} --seed {seed}: --images must be at least 1, and --seed at least 0")
    root = Path(directory).expanduser().absolute()
    config = _config(root, overrides)
    logging.getLogger("owlsam_ray").setLevel(config.logging.level.upper())
    check_shipped(config.detector.weights, config.segment.weights)
    _check_same_pictures(root, num_images, seed)
    check_writable(str(root))
    write_split(root / PICTURES, Split.TEST, num_images, seed=seed)
    _log.info("%d drawn images in %s", num_images, root / PICTURES)
    plan_run(config)
    # Only after planning, which refuses settings other than those that an existing file describes.
    storage.write_atomic(str(root / CONFIG_FILE), _run_file(config, directory).encode())
    counts = _label(config, console)
    evaluation = _measure(config, console)
    _draw_sheet(config, root)
    again = ["demo", "--run", directory, "--images", str(num_images), "--seed", str(seed)]
    again += [f"--set={override}" for override in overrides]
    console.print(_next_steps(directory, again), markup=False, highlight=False, soft_wrap=True)
    overall = evaluation["groups"]["all"]["all"]
    summary = {
        **counts,
        "seed": seed,
        "run_file": str(root / CONFIG_FILE),
        "evaluation": str(root / EVALUATION_FILE),
        "contact_sheet": str(root / SHEET_FILE),
        **{key: overall[key] for key in ("box_ap", "box_ap50", "mask_ap", "miou", "dice", "precision", "recall")},
    }
    from owlsam_ray.run.proof import check_failures

    check_failures(config.reduce.max_failed, summary)
    return summary


def _settings(root: Path) -> dict[str, dict[str, Any]]:
    """Settings of the demo's run file in a directory, without overrides."""
    pictures, models = root / PICTURES, model_settings()
    return {
        "data": {
            "source": "coco",
            "images": str(image_root(pictures)),
            "annotations": str(annotation_file(pictures, Split.TEST)),
        },
        **models,
        "vocabulary": {"categories": "dataset", **models["vocabulary"]},
        "resources": {
            "device": "cpu",
            "actors": 2,
            "cpus_per_actor": 0.6,
            "torch_threads": 1,
            "num_cpus": 2,
            "object_store_mb": 200,
            "shard_size": 8,
        },
        "reduce": {"min_mask_area": 0},
        "evaluate": {
            "ground_truth": str(annotation_file(pictures, Split.TEST)),
            "score_threshold": 0.5,
            "size_edges_px": [32],
        },
    }


def _config(root: Path, overrides: Sequence[str]) -> RunConfig:
    tree: dict[str, Any] = {"run": str(root), **_settings(root)}
    for section, values in load_tree([], overrides).items():
        if section in ("run", "data"):
            raise ConfigError(f"--set {section}…: the demo labels its own images; for others use `owlsam annotate`")
        fields = tree.get(section, {})
        tree[section] = fields | values if isinstance(values, dict) else values
    return with_absolute_paths(validate_tree(RunConfig, tree, [root / CONFIG_FILE]))


def _run_file(config: RunConfig, directory: str) -> str:
    """Format the config as a run file for users to read and copy: explicit settings, one comment per section."""
    command = shlex.join(["annotate", os.path.join(directory, CONFIG_FILE), "--run", directory])
    lines = [
        "# Written by `owlsam demo`, which writes it again: copy it before you change it.",
        f"#   {_program()} {command}",
    ]
    for section, values in config.model_dump(mode="json", exclude_unset=True, exclude={"run"}).items():
        lines += ["", f"{section}: # {_COMMENTS.get(section, 'see the README')}"]
        lines += [f"  {key}: {_yaml(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    """Format a value on one line."""
    return yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=math.inf).strip()[1:-1]


def _check_same_pictures(root: Path, num_images: int, seed: int) -> None:
    """Refuse a directory that belongs to another run or to a demo with other pictures.

    Raises:
        GuardError: it does.
    """
    drawn = annotation_file(root / PICTURES, Split.TEST)
    if not drawn.is_file():
        for name in (RUN_FILE, CONFIG_FILE):
            if (root / name).exists():
                raise GuardError(f"{root} has a {name} that no demo wrote: choose another directory with --run")
        return
    try:
        tree = json.loads(drawn.read_text(encoding="utf-8"))
        there = (len(tree["images"]), tree["info"]["seed"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise GuardError(f"{drawn} is damaged: choose another directory with --run") from None
    if there != (num_images, seed):
        raise GuardError(
            f"{root} holds a demo with --images {there[0]} --seed {there[1]}, not with --images {num_images} "
            f"--seed {seed}: choose another directory with --run"
        )


def _label(config: RunConfig, console: Console) -> dict[str, Any]:
    """Annotate and reduce; return the counts of both."""
    # Set before the import of Ray, which reads it then.
    export_ray_environment(config.resources.auth_mode)

    from owlsam_ray.annotate.attempt import annotate_run
    from owlsam_ray.reduce.run import reduce_run
    from owlsam_ray.run.progress import LazyDisplay

    with LazyDisplay(console) as display:
        labelled = annotate_run(config, show=display.show)
    reduced = reduce_run(config)
    return {
        "run": config.run,
        **{key: reduced[key] for key in ("images", "ok", "empty", "failed", "num_annotations", "num_masks")},
        "new": labelled["new"],
        "annotations": reduced["annotations"],
    }


def _measure(config: RunConfig, console: Console) -> dict[str, Any]:
    from owlsam_ray.evaluate.run import evaluate_run
    from owlsam_ray.evaluate.table import evaluation_table

    evaluation = evaluate_run(config)
    wide = console if console.is_terminal else SafeConsole(file=console.file, width=160)
    wide.print(evaluation_table(evaluation))
    return evaluation


def _draw_sheet(config: RunConfig, root: Path) -> None:
    from owlsam_ray.trial.contact_sheet import read_labelled, write_contact_sheet

    pictures = read_labelled(
        str(root / COCO_FOLDER / ANNOTATIONS),
        config.data.images or "",
        min_score=config.evaluate.score_threshold,
        count=_SHEET_PICTURES,
    )
    if pictures:
        write_contact_sheet(pictures, root / SHEET_FILE, columns=_SHEET_COLUMNS)
        _log.info("labelled images: %s", root / SHEET_FILE)


def _next_steps(directory: str, again: Sequence[str]) -> str:
    """Suggest next commands, ready to be copied; `again` are the arguments of this call."""
    program, run = _program(), shlex.quote(directory)
    training, starting = "", ""
    if Path("jobs/demo-detector.yaml").exists():  # called in a checkout; a wheel has no jobs
        training = f"""
  Train the detector yourself, and label with it:
    {program} finetune jobs/demo-detector.yaml --out runs/detector
    {program} demo --run runs/demo-mine --set detector.weights=runs/detector/model"""
        starting = ", or start from jobs/coco.yaml"
    sheet, file = (shlex.quote(os.path.join(directory, name)) for name in (SHEET_FILE, CONFIG_FILE))
    return f"""
What to try next
  Look at the labels: {sheet}
  Apply another score threshold, without a model, and measure the result:
    {program} reduce {file} --run {run} --set reduce.score_threshold=0.5
    {program} evaluate {file} --run {run}
  Run the same command again: finished images are not labelled twice.
    {program} {shlex.join(again)}{training}
  Label your own images: copy {file}{starting}."""


def _program() -> str:
    """How to call this program from the current directory."""
    if shutil.which("owlsam"):
        return "owlsam"
    beside = Path(".venv/bin/owlsam")
    return str(beside) if beside.exists() else "python -m owlsam_ray"
