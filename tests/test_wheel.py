"""The wheel: built, installed into an environment of its own, and used far from the checkout."""

import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import copy, copytree, ignore_patterns, rmtree

import pytest

import owlsam_ray
from tests.runs import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@dataclass(frozen=True)
class Installed:
    """An environment that holds the wheel and its dependencies, and an empty folder to work in."""

    wheel: Path
    owlsam: Path
    folder: Path

    def call(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        return subprocess.run(
            [str(self.owlsam), *arguments], cwd=self.folder, env=variables, capture_output=True, text=True, check=False
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    root = tmp_path_factory.mktemp("wheel")
    pip = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = root / "source"  # a build in the checkout would take in what an earlier one left there
    copytree(ROOT / "owlsam_ray", source / "owlsam_ray", ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / name, source)
    subprocess.run([sys.executable, *pip, "wheel", "--no-deps", "--wheel-dir", str(root), str(source)], check=True)
    (wheel,) = root.glob("owlsam_ray-*.whl")
    environment = root / "environment"
    venv.create(environment, with_pip=True)
    python, constraints = environment / "bin" / "python", ROOT / "cluster" / "constraints.txt"
    subprocess.run([str(python), *pip, "install", "--constraint", str(constraints), str(wheel)], check=True)
    folder = root / "elsewhere"
    folder.mkdir()
    yield Installed(wheel, environment / "bin" / "owlsam", folder)
    rmtree(environment)  # gigabytes, which pytest would keep


def test_the_wheel_holds_the_package_with_its_types_and_data_and_nothing_else(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        header = archive.read(metadata).decode()
    listed = subprocess.run(["git", "ls-files", "owlsam_ray"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert files == {name for name in listed.stdout.splitlines() if not name.endswith(".md")}
    assert "owlsam_ray/py.typed" in files
    assert f"Version: {owlsam_ray.__version__}\n" in header
    assert {"Source", "Changelog"} <= set(re.findall(r"^Project-URL: (\w+),", header, re.MULTILINE))
    assert "Classifier: Typing :: Typed\n" in header


def test_the_demo_runs_from_the_wheel_and_its_hints_name_only_files_that_exist(installed: Installed) -> None:
    done = installed.call("demo", "--run", "demo", "--images", "12", "--set", "resources.num_cpus=2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["exit_code"] == 0
    hints = done.stderr.split("What to try next")[1]
    inputs = [
        name for name in re.findall(r"[\w./-]+\.(?:yaml|png|json|md|sh)\b", hints) if not name.startswith("runs/")
    ]
    assert {"demo/run.yaml", "demo/contact_sheet.png"} <= set(inputs)
    assert [name for name in inputs if not (installed.folder / name).exists()] == []
    assert "jobs/" not in hints


def test_every_command_of_the_wheel_explains_itself(installed: Installed) -> None:
    main = installed.call("--help").stdout
    commands = re.findall(r"^    ([a-z][a-z-]+) ", main, re.MULTILINE)
    assert {"plan", "annotate", "reduce", "demo"} <= set(commands)
    for command in commands:
        done = installed.call(command, "--help")
        assert (done.returncode, "jobs/" in done.stdout) == (0, False), command
