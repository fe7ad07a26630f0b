"""The batch scripts without Slurm: stand-ins for owlsam, squeue, scontrol and sbatch tell what they were asked."""

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.runs import ROOT

SCRIPTS = ROOT / "cluster" / "slurm"
_RECORD = """#!/usr/bin/env bash
printf '%s\\n' "${0##*/}" "$@" --- >>"$FOLDER/calls"
"""
_OWLSAM = """
echo "$RAY_TMPDIR" >"$FOLDER/ray"
trap 'echo TERM >>"$FOLDER/signals"; sleep 0.3; exit "$CODE"' TERM
[ -n "$LONG" ] || exit "$CODE"
touch "$FOLDER/started"
while :; do sleep 0.05; done
"""


@dataclass(frozen=True)
class Desk:
    """A folder with a space in its name, the stand-ins, and a job's environment."""

    folder: Path
    variables: dict[str, str]

    def environment(self, **variables: str) -> dict[str, str]:
        return self.variables | variables

    def start(self, script: str, *arguments: str, **variables: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["bash", str(SCRIPTS / script), *arguments],
            env=self.environment(**variables),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def calls(self, program: str) -> list[list[str]]:
        """Arguments of each call."""
        if not (self.folder / "calls").exists():
            return []
        calls = [call.splitlines() for call in (self.folder / "calls").read_text().split("---\n") if call]
        return [arguments for name, *arguments in calls if name == program]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    folder = tmp_path / "a desk"
    (folder / "bin").mkdir(parents=True)
    programs = {
        "owlsam": _OWLSAM,
        "squeue": 'echo "$STATE"\n',
        # Slurm ends a job that is queued again; this one does so after a while, as Slurm does.
        "scontrol": '[ -n "$CAN_REQUEUE" ] || exit 1\n(sleep 0.3; kill -TERM "$PPID") >/dev/null 2>&1 &\n',
        "sbatch": 'case "$*" in *reduce*) echo 18 ;; *) echo "17;a-cluster" ;; esac\n',
        "sleep": '[ "$1" = 10 ] || exec /bin/sleep "$@"\n',  # no ten seconds between two tries to queue again
    }
    for name, text in programs.items():
        record = _RECORD if name != "sleep" else "#!/usr/bin/env bash\n"
        (folder / "bin" / name).write_text(record + text)
        (folder / "bin" / name).chmod(0o755)
    variables = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "FOLDER": str(folder),
        "OWLSAM": str(folder / "bin" / "owlsam"),
        "OWLSAM_TMP": str(folder),
        "OWLSAM_HOME": str(ROOT),
        "SLURM_SUBMIT_DIR": "/nowhere",
        "SLURM_JOB_ID": "17",
        "SLURM_CPUS_ON_NODE": "6",
        "STATE": "RUNNING",
        "CAN_REQUEUE": "yes",
        "CODE": "0",
        "LONG": "",
    }
    return Desk(folder, variables)


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    _, errors = process.communicate(timeout=20)
    return process.returncode, errors


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 5, 137])
def test_other_exit_codes_are_the_jobs(desk: Desk, code: int) -> None:
    assert finish(desk.start("attempt.sh", "run.yaml", "runs/1", CODE=str(code)))[0] == code
    assert not desk.calls("scontrol")


def test_interrupted_is_queued_again(desk: Desk) -> None:
    code, errors = finish(desk.start("attempt.sh", "run.yaml", "runs/1", CODE="75"))
    assert code == 75
    assert desk.calls("scontrol") == [["requeue", "17"]]
    assert "queued again (1 of at most 50)" in errors


def test_task_of_an_array_queues_itself_again(desk: Desk) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}
    finish(desk.start("attempt.sh", "run.yaml", "runs/1", CODE="75", **array))
    assert desk.calls("scontrol") == [["requeue", "17_3"]]
    assert "--jobs=17_3" in desk.calls("squeue")[0]


def test_no_more_often_than_allowed(desk: Desk) -> None:
    limit = {"CODE": "75", "OWLSAM_MAX_REQUEUES": "2"}
    for restarts in range(3):
        _, errors = finish(desk.start("attempt.sh", "r", "d", SLURM_RESTART_COUNT=str(restarts), **limit))
    assert len(desk.calls("scontrol")) == 2
    assert "interrupted after 2 requeues" in errors


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING", ""])
def test_a_cancelled_job_stays_cancelled(desk: Desk, state: str) -> None:
    assert finish(desk.start("attempt.sh", "run.yaml", "runs/1", CODE="75", STATE=state))[0] == 75
    assert not desk.calls("scontrol")


def test_a_refused_requeue_is_tried_again_then_told(desk: Desk) -> None:
    code, errors = finish(desk.start("attempt.sh", "run.yaml", "runs/1", CODE="75", CAN_REQUEUE=""))
    assert code == 75
    assert len(desk.calls("scontrol")) == 6
    assert "submit it again to continue" in errors


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_reach_the_driver_as_sigterm_and_its_end_is_awaited(desk: Desk, number: signal.Signals) -> None:
    process = desk.start("attempt.sh", "run.yaml", "runs/1", LONG="yes", CODE="3")
    wait_for(desk.folder / "started")
    process.send_signal(number)
    time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)  # while the driver finishes what it has in hand
    assert finish(process)[0] == 3
    assert set((desk.folder / "signals").read_text().split()) == {"TERM"}


def test_a_driver_that_dies_of_the_signal_was_interrupted(desk: Desk) -> None:
    (desk.folder / "bin" / "owlsam").write_text('#!/usr/bin/env bash\ntouch "$FOLDER/started"\nexec sleep 30\n')
    process = desk.start("attempt.sh", "run.yaml", "runs/1")
    wait_for(desk.folder / "started")
    process.send_signal(signal.SIGUSR1)
    assert finish(process)[0] == 75
    assert desk.calls("scontrol") == [["requeue", "17"]]


def test_ray_gets_a_folder_of_its_own_which_is_removed(desk: Desk) -> None:
    (desk.folder / "owlsam-17" / "left").mkdir(parents=True)  # by an attempt that was killed
    assert finish(desk.start("attempt.sh", "run.yaml", "runs/1"))[0] == 0
    assert (desk.folder / "ray").read_text().strip() == str(desk.folder / "owlsam-17")
    assert not (desk.folder / "owlsam-17").exists()


def test_a_folder_that_cannot_be_made_is_told(desk: Desk) -> None:
    code, errors = finish(desk.start("attempt.sh", "run.yaml", "runs/1", OWLSAM_TMP="/nowhere at all"))
    assert code == 2
    assert "set OWLSAM_TMP" in errors
    assert not desk.calls("owlsam")


def test_arguments_are_passed_as_they_are(desk: Desk) -> None:
    odd = ["a run.yaml", "the $HOME/run *", "--set", "data.images=my photos; rm -rf /"]
    finish(desk.start("annotate.sbatch", *odd, SLURM_MEM_PER_NODE="4000"))
    sizes = ["resources.num_cpus=6", "resources.object_store_mb=1200", "resources.actor_memory_gb=3.356"]
    expected = ["annotate", odd[0], "--run", odd[1], *(part for size in sizes for part in ("--set", size)), *odd[2:]]
    assert desk.calls("owlsam") == [expected]


def test_memory_by_cpu(desk: Desk) -> None:
    finish(desk.start("annotate.sbatch", "r", "d", SLURM_MEM_PER_CPU="1000"))
    assert "resources.object_store_mb=1800" in desk.calls("owlsam")[0]


@pytest.mark.parametrize(
    ("task", "count", "last", "slices", "expected"),
    [
        (0, 8, 7, "", "1/8"),
        (7, 8, 7, "", "8/8"),
        (3, 2, 7, "8", "4/8"),  # --array=3,7 of a run in eight slices
        (3, 2, 7, "", None),
        (3, 1, 3, "", None),
        (8, 1, 8, "8", None),
    ],
)
def test_slices(desk: Desk, task: int, count: int, last: int, slices: str, expected: str | None) -> None:
    variables = {"TASK_ID": task, "TASK_COUNT": count, "TASK_MAX": last, "JOB_ID": 17}
    array = {f"SLURM_ARRAY_{name}": str(value) for name, value in variables.items()}
    if slices:
        array["OWLSAM_SLICES"] = slices
    code, errors = finish(desk.start("annotate-array.sbatch", "run.yaml", "runs/1", **array))
    if expected is None:
        assert code == 2
        assert "OWLSAM_SLICES" in errors
        assert not desk.calls("owlsam")
    else:
        assert code == 0
        assert desk.calls("owlsam")[0][-2:] == ["--slice", expected]


def test_submit_plans_and_submits_both_jobs(desk: Desk) -> None:
    process = desk.start("submit.sh", "a run.yaml", "runs/1", "4", "--time=5", OWLSAM_REDUCE_OPTIONS="--mem=2G -p cpu")
    output, _ = process.communicate(timeout=20)
    assert output == "annotate 17\nreduce 18\n"
    assert desk.calls("owlsam") == [["plan", "a run.yaml", "--run", "runs/1"]]
    label, reduce = desk.calls("sbatch")
    home = str(SCRIPTS)
    assert label == ["--parsable", "--array=0-3", "--time=5", f"{home}/annotate-array.sbatch", "a run.yaml", "runs/1"]
    dependent = ["--dependency=afterok:17", "--kill-on-invalid-dep=yes"]
    assert reduce == [
        "--parsable",
        *dependent,
        "--mem=2G",
        "-p",
        "cpu",
        f"{home}/reduce.sbatch",
        "a run.yaml",
        "runs/1",
    ]


def test_submit_one_task_is_no_array(desk: Desk) -> None:
    assert finish(desk.start("submit.sh", "run.yaml", "runs/1"))[0] == 0
    assert desk.calls("sbatch")[0] == ["--parsable", str(SCRIPTS / "annotate.sbatch"), "run.yaml", "runs/1"]


def test_submit_nothing_when_the_plan_fails(desk: Desk) -> None:
    assert finish(desk.start("submit.sh", "run.yaml", "runs/1", CODE="2"))[0] == 2
    assert not desk.calls("sbatch")


@pytest.mark.parametrize("arguments", [["run.yaml"], ["run.yaml", "runs/1", "0"], ["run.yaml", "runs/1", "--time=5"]])
def test_submit_tells_its_usage(desk: Desk, arguments: list[str]) -> None:
    code, errors = finish(desk.start("submit.sh", *arguments))
    assert code == 2
    assert errors.startswith("usage:")
    assert not desk.calls("owlsam")


def test_reduce(desk: Desk) -> None:
    job = desk.start("reduce.sbatch", "a run.yaml", "runs/1", "--set", "reduce.score_threshold=0.3", CODE="5")
    assert finish(job)[0] == 5
    expected = ["reduce", "a run.yaml", "--run", "runs/1", "--set", "reduce.score_threshold=0.3"]
    assert desk.calls("owlsam") == [expected]


def test_scripts_pass_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = [*SCRIPTS.glob("*.s*"), Path(__file__).parent / "cluster.sh"]
    command = ["shellcheck", "--external-sources", f"--source-path={ROOT}", *map(str, sorted(scripts))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 20
    while not file.exists():
        assert time.monotonic() < deadline, f"no {file} after 20 s"
        time.sleep(0.02)
