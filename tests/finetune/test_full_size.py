"""The full-size OwlViT B/32 takes steps on real images, in the memory of a workstation."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from owlsam_ray.finetune.config import load_finetune_config
from tests import seeded_owlvit
from tests.runs import ROOT, environment

_CODE = """
import json, resource, sys
from owlsam_ray.finetune import loop
from owlsam_ray.finetune.config import load_finetune_config
from tests.finetune.drawn import run_alone
loop.LOG_EVERY = 1
lines = run_alone(load_finetune_config([sys.argv[1]], out=sys.argv[2]))
print(json.dumps({"lines": lines, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))
"""


@pytest.mark.slow
def test_b32_takes_steps_on_coco_within_20_gb(tmp_path: Path, shared: Path) -> None:
    seeded_owlvit.write_full(tmp_path / "owlvit", shared)
    fields = yaml.safe_load((ROOT / "jobs" / "coco-detector.yaml").read_text(encoding="utf-8"))
    fields["detector"]["weights"] = str(tmp_path / "owlvit")
    fields["data"] = {
        "train": {
            "annotations": str(shared / "data" / "coco_mini" / "instances.json"),
            "images": str(shared / "data" / "coco_mini" / "images"),
        }
    }
    fields["optimizer"] |= {"steps": 3, "batch_size": 2, "dtype": "fp32", "warmup_steps": 0, "lr": 1e-4}
    fields["resources"] = {"loader_threads": 1}
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(fields), encoding="utf-8")
    assert load_finetune_config([job]).detector is not None
    # In a process of its own: the peak of memory is a process's.
    done = subprocess.run(
        [sys.executable, "-c", _CODE, str(job), str(tmp_path / "out")],
        capture_output=True, text=True, check=False, env=environment(), cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    print(result)
    losses = [line["loss"] for line in result["lines"] if "loss" in line]
    assert len(losses) == 3
    assert all(loss == loss and loss < 1e4 for loss in losses)
    assert result["peak_gb"] < 20
