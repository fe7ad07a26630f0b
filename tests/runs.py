"""Whole runs on drawn images with tiny models, for the tests of the engine, the pipeline and the command line."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

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
        done = subprocess.run(
            self.command(name, run, **settings),
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
