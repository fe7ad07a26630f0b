"""New Python processes find this package, and none of the modules that lie in their working directory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import owlsam_ray
from owlsam_ray.parallel import child_imports
from owlsam_ray.parallel.child_imports import child_variables, children_find_package, without_working_directory
from owlsam_ray.parallel.processes import in_order

CODE = "import sys, queue, owlsam_ray; print(queue.__file__); print(owlsam_ray.__file__)"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with modules of the names of Python's own."""
    for name in ("queue", "statistics", "struct", "logging"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module of the user')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def imported(**variables: str) -> list[Path]:
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env=os.environ | variables
    )
    return [Path(line) for line in done.stdout.splitlines()]


def test_a_child_imports_pythons_own(work: Path, tmp_path: Path) -> None:
    found, ours = imported(**child_variables(tmp_path))
    assert found.parent == Path(os.__file__).parent
    assert ours.resolve() == Path(owlsam_ray.__file__).resolve()


def test_a_copy_that_is_not_installed_is_found_by_its_children(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout that was only put on the path of this process; what lies beside the package stays out."""
    checkout = tmp_path / "checkout"
    shutil.copytree(Path(owlsam_ray.__file__).parent, checkout / "owlsam_ray", ignore=lambda *_: ["demo", "vocabulary"])
    (checkout / "queue.py").write_text("raise SystemExit('beside the package')\n", encoding="utf-8")
    monkeypatch.setattr(child_imports, "_PACKAGE", checkout / "owlsam_ray")
    assert not children_find_package()
    variables = child_variables(tmp_path)
    found, ours = imported(**variables)
    assert found.parent == Path(os.__file__).parent
    assert ours.resolve() == checkout / "owlsam_ray" / "__init__.py"
    assert child_variables(tmp_path) == variables  # a second process in the same folder

    monkeypatch.setenv("PYTHONPATH", str(checkout))
    assert children_find_package()
    assert child_variables(tmp_path) == {"PYTHONSAFEPATH": "1"}


def test_spawned_processes_import_pythons_own(work: Path) -> None:
    assert list(in_order(len, ["a", "bb", "ccc"], 2)) == [1, 2, 3]


def test_the_environment_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "", "1"):
        monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
        if value is not None:
            monkeypatch.setenv("PYTHONSAFEPATH", value)
        with without_working_directory():
            assert os.environ["PYTHONSAFEPATH"] == "1"
        assert os.environ.get("PYTHONSAFEPATH") == value


def test_the_module_is_started_beside_a_users_modules(work: Path) -> None:
    """`statistics` and `queue` are imported by the command, `struct` and `logging` as well."""
    done = subprocess.run(
        [sys.executable, "-m", "owlsam_ray", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.split()[-1:]) == (0, [owlsam_ray.__version__]), done.stderr
