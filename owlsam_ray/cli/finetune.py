"""`owlsam finetune`: train a detector or a segmenter on a COCO dataset; run the same command again to resume."""

import argparse
import json
from typing import Any

from owlsam_ray.cli.log import start_log
from owlsam_ray.cli.options import add_overrides
from owlsam_ray.cli.standard_streams import Answers
from owlsam_ray.storage.secrets import masked_tree
from owlsam_ray.terminal import SafeConsole

HELP = "train a detector or a segmenter on a COCO dataset; run the same command again to resume"
EXAMPLES = """examples:
  owlsam finetune detector.yaml --out runs/detector
  owlsam finetune segmenter.yaml --out s3://bucket/segmenter --set resources.workers=8
  owlsam annotate run.yaml --run runs/mine --set detector.weights=runs/detector/model

Writes metrics to stdout, one JSON line each, to DIR/metrics.jsonl and to DIR/tensorboard. DIR/model is the model that
`annotate` loads: the best one by validation, or the last one without a validation set."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    command.add_argument(
        "job_files", nargs="+", metavar="JOBFILE", help="YAML files of the training job, merged from left to right"
    )
    command.add_argument(
        "--out", metavar="DIR", help="output directory or fsspec URL (overrides `out:` of the job files)"
    )
    add_overrides(command)


def run(options: argparse.Namespace, answers: Answers) -> dict[str, Any]:
    """Run the command; return the fields of its JSON line."""
    from owlsam_ray.finetune.config import load_finetune_config
    from owlsam_ray.parallel.allocation import export_ray_environment

    config = load_finetune_config(options.job_files, overrides=options.overrides, out=options.out)
    start_log(SafeConsole(stderr=True), config.logging.level)
    export_ray_environment(config.resources.auth_mode)

    from owlsam_ray.finetune.job import finetune

    return {"out": config.out} | finetune(config, report=lambda line: answers.write(json.dumps(masked_tree(line))))
