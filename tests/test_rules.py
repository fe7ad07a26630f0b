"""House rules: rooms and layers, who may import Ray, the run files in jobs/."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from owlsam_ray.config.load import load_config
from owlsam_ray.finetune.config import load_finetune_config
from owlsam_ray.run import paths

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "owlsam_ray"
LAYERS = (
    ("errors", "terminal"),
    ("records", "storage"),
    ("schema", "config", "ops"),
    ("vocabulary", "models", "coco_files", "parallel"),
    ("sources", "run", "inference"),
    ("fetch", "reduce", "evaluate"),
    ("plan", "calibrate", "finetune"),
    ("annotate",),
    ("trial",),
    ("demo",),
    ("cli",),
)
"""Rooms, from the lowest layer up. A file imports from its own room and from lower layers, lazy imports counted."""
FLAT = {"__init__", "__main__", "errors", "terminal", "records", "schema"}
"""The only modules that are no folders."""
MAY_IMPORT_RAY = {
    "annotate/attempt.py",
    "annotate/pipeline.py",
    "annotate/waves.py",
    "finetune/job.py",
    "finetune/process_group.py",
    "parallel/executors.py",
    "parallel/ray_cluster.py",
    "parallel/ray_watch.py",
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def layer_of(room: str) -> int:
    """Number of the layer of a room, from 1."""
    return next(number for number, rooms in enumerate(LAYERS, 1) if room in rooms)


def room_of(module: Path) -> str:
    """Folder directly in the package, or flat module."""
    return module.relative_to(PACKAGE).with_suffix("").parts[0]


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


def test_every_file_has_a_room() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == FLAT
    assert {room_of(module) for module in MODULES} - {"__init__", "__main__"} == {
        room for layer in LAYERS for room in layer
    }


def test_imports_come_from_the_own_room_or_lower_layers() -> None:
    wrong = []
    for module in MODULES:
        for name in imported_modules(module):
            target = module_path(name) if name.startswith("owlsam_ray") else None
            if target is None or target == PACKAGE / "__init__.py" or room_of(module) in ("__main__", room_of(target)):
                continue
            if layer_of(room_of(target)) >= layer_of(room_of(module)):
                wrong.append(f"{module.relative_to(PACKAGE)} must not import {name}")
    assert wrong == []


def test_every_module_says_what_it_is() -> None:
    """Its first line is its caption on the map."""
    captions = {module: ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) for module in MODULES}
    assert [str(module) for module, caption in captions.items() if not caption] == []


def test_core_does_not_import_ray() -> None:
    importing = {
        module.relative_to(PACKAGE).as_posix()
        for module in MODULES
        if any(name.split(".")[0] == "ray" for name in imported_modules(module))
    }
    assert importing <= MAY_IMPORT_RAY


def test_engine_loads_without_ray() -> None:
    code = "import sys, owlsam_ray.inference.engine; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_package_loads_neither_torch_nor_ray() -> None:
    code = "import sys, owlsam_ray, owlsam_ray.cli.main; sys.exit(bool({'ray', 'torch'} & set(sys.modules)))"
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
    for path, tree in ((path, ast.parse(path.read_text(encoding="utf-8"))) for path in MODULES):
        for node in ast.walk(tree):
            if isinstance(node, ast.FormattedValue) and node.conversion == ord("r"):
                text = ast.unparse(node.value)
                is_short = re.search(r"\[:\d+\]$", text) or text in ("marks[0]", "near") or node.format_spec is not None
                if not is_short:
                    found.append(f"{path.name}:{node.lineno}: {text}")
    assert found == []


def test_the_readme_names_every_room() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named: dict[str, int] = {}
    for layer, names in re.findall(r"^\| (\d+) \| (`[^|]*`) \|", readme, re.MULTILINE):
        named |= {name.removesuffix("/").removesuffix(".py"): int(layer) for name in re.findall(r"`([^`]+)`", names)}
    assert named == {room: number for number, rooms in enumerate(LAYERS, 1) for room in rooms}


def test_names_in_a_run_directory_are_in_one_place() -> None:
    names = {value for name, value in vars(paths).items() if name.isupper() and isinstance(value, str)}
    assert len(names) > 10
    meant_otherwise = {"attempts", "coco", "manifest", "predictions", "review"}  # keys of JSON, sources, formats
    found = []
    for module in MODULES:
        if module == PACKAGE / "run" / "paths.py":
            continue
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in names - meant_otherwise:
                found.append(f"{module.name}:{node.lineno}: {node.value}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "storage.join":
                found += [f"{module.name}:{node.lineno}" for each in node.args if getattr(each, "value", None) in names]
    assert found == []
