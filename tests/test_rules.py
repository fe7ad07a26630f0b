"""House rules: import levels, who may import Ray, the README's file tree, the run files in jobs/."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from owlsam_ray.config import load_config
from owlsam_ray.finetune.config import load_finetune_config

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "owlsam_ray"
MAY_IMPORT_RAY = {
    "pipeline.py",
    "ray_cluster.py",
    "ray_watch.py",
    "waves.py",
    "annotate.py",
    "finetune/job.py",
    "finetune/process_group.py",
    "reduce/executors.py",
}
STORED_RUNS = ROOT / "tests" / "fixtures" / "earlier"
LISTED = ("owlsam_ray", "jobs", "cluster", "tests", ".ci")


@cache
def readme_tree() -> dict[str, str]:
    """Path → rest of the line, for every file in the README's tree."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- tree -->\n```\n(.*?)```", readme, re.DOTALL)
    assert block is not None, "README.md has no file tree"
    files: dict[str, str] = {}
    folders: list[str] = []
    for line in block.group(1).splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, caption = line.strip().partition(" ")
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            files["".join(folders) + name] = caption.strip()
    return files


def package_files() -> set[str]:
    files = (path for folder in LISTED for path in (ROOT / folder).rglob("*") if path.is_file())
    return {
        path.relative_to(ROOT).as_posix()
        for path in files
        if not path.is_relative_to(STORED_RUNS)
        and "__pycache__" not in path.parts
        and path.name != "__init__.py"
        and path.suffix != ".pyc"
    }


def level_of(module: Path) -> int:
    """The level that the README's tree gives a module; that of its folder's files for an `__init__.py`."""
    tree = readme_tree()
    relative = module.relative_to(ROOT).as_posix()
    if module.name == "__init__.py":
        if module.parent == PACKAGE:
            return 0
        prefix = module.parent.relative_to(ROOT).as_posix() + "/"
        return min(
            int(caption.split()[0])
            for path, caption in tree.items()
            if path.startswith(prefix) and path.endswith(".py")
        )
    return int(tree[relative].split()[0])


@cache
def imported_modules(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path} uses a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def module_path(name: str) -> Path | None:
    base = ROOT / Path(*name.split("."))
    if base.with_suffix(".py").is_file():
        return base.with_suffix(".py")
    return base / "__init__.py" if (base / "__init__.py").is_file() else None


def test_readme_tree_equals_files() -> None:
    assert set(readme_tree()) == package_files()


@pytest.mark.parametrize("module", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_only_from_lower_levels_or_own_folder(module: Path) -> None:
    for name in imported_modules(module):
        target = module_path(name) if name.startswith("owlsam_ray") else None
        if target is None or target == PACKAGE / "__init__.py":
            continue
        own_folder = target.parent == module.parent != PACKAGE
        assert own_folder or level_of(target) < level_of(module), f"{module.name} must not import {name}"


@pytest.mark.parametrize("module", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_core_does_not_import_ray(module: Path) -> None:
    imports_ray = any(name.split(".")[0] == "ray" for name in imported_modules(module))
    assert not imports_ray or module.relative_to(PACKAGE).as_posix() in MAY_IMPORT_RAY


def test_engine_loads_without_ray() -> None:
    code = "import sys, owlsam_ray.engine; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_package_loads_neither_torch_nor_ray() -> None:
    code = "import sys, owlsam_ray, owlsam_ray.cli; sys.exit(bool({'ray', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("file", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_job_file_loads(file: Path) -> None:
    if "optimizer:" in file.read_text(encoding="utf-8"):
        assert load_finetune_config([file]).optimizer.steps >= 1
    else:
        assert load_config([file]).detector.max_detections >= 1


def test_coco_run_file_shows_every_section() -> None:
    text = (ROOT / "jobs" / "coco.yaml").read_text(encoding="utf-8")
    sections = set(re.findall(r"^(\w+): #", text, re.MULTILINE))
    assert sections == set(type(load_config([ROOT / "jobs" / "coco.yaml"])).model_fields) - {"run", "fakes"}


def test_messages_cut_every_value() -> None:
    """What `!r` writes into a message has no limit, and comes from anywhere: `errors.shown` writes it instead."""
    found = []
    for path, tree in ((path, ast.parse(path.read_text(encoding="utf-8"))) for path in sorted(PACKAGE.rglob("*.py"))):
        for node in ast.walk(tree):
            if isinstance(node, ast.FormattedValue) and node.conversion == ord("r"):
                text = ast.unparse(node.value)
                is_short = re.search(r"\[:\d+\]$", text) or text in ("marks[0]", "near") or node.format_spec is not None
                if not is_short:
                    found.append(f"{path.name}:{node.lineno}: {text}")
    assert found == []
