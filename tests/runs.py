"""Whole runs on drawn images with tiny models, for the tests of the engine, the pipeline and the command line."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from owlsam_ray import storage
from owlsam_ray.config.run import RunConfig
from tests.drawn_images import draw_coco
from tests.seeded_mobile_sam import write_tiny as write_tiny_mobile_sam
from tests.seeded_owlvit import write_tiny as write_tiny_owlvit

ROOT = Path(__file__).parents[1]
CATEGORIES = ["cat", "traffic light", "remote", "red ball"]
TWO_ACTORS = {"resources.actors": 2, "resources.shard_size": 8}


@dataclass(frozen=True)
class TinyRun:
    """A dataset, tiny weights and a run file; each `run` directory of it is a fresh start."""

    root: Path
    num_images: int
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def run_file(self) -> Path:
        return self.root / "run.yaml"

    def command(self, name: str, run: Path | str, **settings: Any) -> list[str]:
        sets = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
        return [sys.executable, "-m", "owlsam_ray", name, str(self.run_file), "--run", str(run), *sets]

    def call(self, name: str, run: Path | str, *, check: int | None = 0, **settings: Any) -> dict[str, Any]:
        """Run a command to its end; returns its JSON summary."""
        return self.call_command(self.command(name, run, **settings), check=check)

    def start(self, name: str, run: Path | str, **settings: Any) -> "subprocess.Popen[bytes]":
        """Run a command in the background, its log beside the run directory."""
        with Path(f"{run}.log").open("ab") as log:
            return subprocess.Popen(
                self.command(name, run, **settings),
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=environment(),
                cwd=ROOT,
                start_new_session=True,
            )

    @staticmethod
    def call_command(command: list[str], *, check: int | None = 0) -> dict[str, Any]:
        """The same for a command with options."""
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env=environment(),
            cwd=ROOT,
        )
        assert check is None or done.returncode == check, f"exit {done.returncode}\n{done.stderr[-4000:]}"
        summary = json.loads(done.stdout.strip().splitlines()[-1])
        assert summary["exit_code"] == done.returncode
        return dict(summary, log=done.stderr)


def environment() -> dict[str, str]:
    """Offline, with little to say, and with a leftover of some other use of Ray."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "token", "PYTHONWARNINGS": "ignore"}


def make_tiny_run(root: Path, *, num_images: int, **sections: Any) -> TinyRun:
    """Draw images, write tiny weights and a run file under `root`."""
    draw_coco(root / "data", num_images, seed=3)
    write_tiny_owlvit(root / "owlvit", seed=1)
    write_tiny_mobile_sam(root / "mobile_sam", seed=2)
    config: dict[str, Any] = {
        "data": {
            "source": "coco",
            "images": str(root / "data" / "images"),
            "annotations": str(root / "data" / "instances.json"),
        },
        "vocabulary": {"categories": CATEGORIES, "templates": "a {}"},
        "detector": {"weights": str(root / "owlvit"), "score_floor": 0.3, "max_detections": 6},
        "suppress": {"threshold": 0.6},
        "segment": {"weights": str(root / "mobile_sam")},
        "reduce": {"min_mask_area": 0},
        "resources": {"num_cpus": 2, "object_store_mb": 200, "grace_s": 30},
        "logging": {"progress_s": 0.5},
    }
    for name, values in sections.items():
        config[name] = config.get(name, {}) | values
    (root / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return TinyRun(root, num_images)


def coco_bytes(tiny: TinyRun, run: Path) -> bytes:
    """Reduce a run; returns its COCO file."""
    tiny.call("reduce", run)
    return (run / "coco" / "annotations.json").read_bytes()


def label_here(config: RunConfig, *, extend: bool = False, allow_numerics_change: bool = False) -> bytes:
    """Plan, label what is not labelled yet, and reduce in this process, without Ray (whose actors are other processes
    and see no `memory://`); returns the COCO file."""
    # Imported here: most tests of whole runs call the command, and need no torch in this process.
    from owlsam_ray.annotate.attempt import embed_run_queries
    from owlsam_ray.fetch.images import fetch_shard, to_images
    from owlsam_ray.inference.load import open_engine
    from owlsam_ray.inference.queries import load_embeddings
    from owlsam_ray.models.arithmetic import restored_arithmetic
    from owlsam_ray.models.load import find_models
    from owlsam_ray.parallel.allocation import allocate
    from owlsam_ray.plan.plan import plan_run
    from owlsam_ray.reduce.run import reduce_run
    from owlsam_ray.run.guard import fingerprint_parts, guard_labels, guard_numerics, numerics_of
    from owlsam_ray.run.paths import QUERY_FILE
    from owlsam_ray.run.shards import done_shards, write_shard
    from owlsam_ray.schema import predictions_to_table

    storage.configure(config.storage.policy())
    run = plan_run(config, extend=extend).run
    models = find_models(config.detector, config.segment)
    if run.record.fingerprint is None:
        embed_run_queries(run, models.detector)
    weights = {"detector": models.detector, "segmenter": models.segmenter}
    run = guard_labels(run, fingerprint_parts(run, weights=weights))
    allocation = allocate(config.resources, num_cpus=2, num_gpus=0)
    run = guard_numerics(run, numerics_of(allocation, config.resources.dtype), allow_change=allow_numerics_change)
    record = run.record
    queries = load_embeddings(storage.join(run.url, QUERY_FILE), record.vocabulary)
    with restored_arithmetic(), open_engine(config, allocation, models=models, queries=queries) as engine:
        for shard in sorted(set(run.manifest.iter_shards()) - done_shards(run.url)):
            fetched = fetch_shard(run.manifest, shard, threads=4, max_file_mb=config.decode.max_file_mb)
            predictions, stage_s = engine.annotate(to_images(fetched))
            rows = predictions_to_table(predictions)
            marks = {"fingerprint": record.fingerprint or "", "numerics": record.numerics_id}
            write_shard(run.url, shard, rows, **marks, stage_s=stage_s)
    reduce_run(config)
    return storage.read_bytes(storage.join(run.url, "coco", "annotations.json"))
