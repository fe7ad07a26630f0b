"""Limits and kills that control groups tell, in trees like those that schedulers and containers make."""

from pathlib import Path

import pytest

from owlsam_ray.parallel.node_memory import memory_kills, memory_limit


def tree(root: Path, own: str, files: dict[str, str]) -> dict[str, Path]:
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(own)
    (root / "cgroup").mkdir()
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return {"cgroups": root / "cgroup", "proc": root / "proc"}


_SLURM_1 = "9:cpu:/x\n4:memory:/slurm/uid_7/job_9/step_0\n0::/\n"
_NO_LIMIT_1 = "9223372036854771712\n"


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        (  # version 1, the limit at the job, above the step
            _SLURM_1,
            {
                "cgroup/memory/memory.limit_in_bytes": _NO_LIMIT_1,
                "cgroup/memory/slurm/uid_7/job_9/memory.limit_in_bytes": "1500000",
                "cgroup/memory/slurm/uid_7/job_9/step_0/memory.limit_in_bytes": _NO_LIMIT_1,
            },
            1_500_000,
        ),
        (  # version 2, the limit two levels up
            "0::/system.slice/slurm/job_9/step/task\n",
            {
                "cgroup/system.slice/slurm/job_9/memory.max": "2500000\n",
                "cgroup/system.slice/slurm/job_9/step/memory.max": "max\n",
                "cgroup/system.slice/slurm/job_9/step/task/memory.max": "max\n",
            },
            2_500_000,
        ),
        ("0::/\n", {"cgroup/memory.max": "3500000\n"}, 3_500_000),  # a container with a name space of its own
        (  # a container that sees the path of its host
            "4:memory:/docker/abc\n",
            {"cgroup/memory/memory.limit_in_bytes": "4500000\n"},
            4_500_000,
        ),
        ("0::/../../elsewhere\n", {"cgroup/memory.max": "5500000\n"}, 5_500_000),
    ],
)
def test_the_smallest_limit_up_to_the_root_counts(tmp_path: Path, own: str, files: dict[str, str], limit: int) -> None:
    assert memory_limit(**tree(tmp_path, own, files)) == limit


@pytest.mark.parametrize("files", [{}, {"cgroup/memory.max": "max\n"}, {"cgroup/memory.max": "many"}])
def test_without_a_limit_it_is_the_machines(tmp_path: Path, files: dict[str, str]) -> None:
    limit = memory_limit(**tree(tmp_path, "0::/\n\nodd\n", files))
    assert limit is not None
    assert limit > 10**8


@pytest.mark.parametrize(
    ("own", "files", "kills"),
    [
        ("0::/job\n", {"cgroup/job/memory.events": "low 0\nhigh 3\noom 5\noom_kill 4\n"}, 4),
        (_SLURM_1, {"cgroup/memory/slurm/uid_7/job_9/step_0/memory.oom_control": "under_oom 0\noom_kill 7\n"}, 7),
        ("0::/job\n", {"proc/vmstat": "nr_free_pages 1\noom_kill 12\n"}, 12),
        ("0::/job\n", {}, None),
        ("0::/job\n", {"cgroup/job/memory.events": "oom_kill many\n"}, None),
    ],
)
def test_kills_are_counted_where_the_kernel_counts(
    tmp_path: Path, own: str, files: dict[str, str], kills: int | None
) -> None:
    assert memory_kills(**tree(tmp_path, own, files)) == kills
