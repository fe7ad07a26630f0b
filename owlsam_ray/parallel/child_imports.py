"""What the Python processes that are started here import: never what happens to lie in the working directory.

A user's own `statistics.py` or folder `timm` beside the run file is no module of ours. Python puts the working
directory first on the path of `python -m` and `python -c`, and Ray puts it first on that of its workers.
"""

import contextlib
import os
import site
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

import owlsam_ray

_SAFE_PATH = "PYTHONSAFEPATH"
_PACKAGE = Path(owlsam_ray.__file__).resolve().parent


@contextlib.contextmanager
def without_working_directory() -> Iterator[None]:
    """Python processes that are started meanwhile leave out the working directory."""
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_SAFE_PATH, None)
        else:
            os.environ[_SAFE_PATH] = before


def child_variables(folder: Path) -> dict[str, str]:
    """Environment variables of a Python process that is to find this very package, and nothing in its directory.

    Args:
        folder: of the caller's own; the package is linked into it when a new process would not find it.
    """
    variables = {_SAFE_PATH: "1"}
    if not children_find_package():
        link = folder / "packages" / _PACKAGE.name
        link.parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):
            link.symlink_to(_PACKAGE, target_is_directory=True)
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(link.parent), os.environ.get("PYTHONPATH")]))
    return variables


def children_find_package() -> bool:
    """Whether a new Python process finds this package, and no other copy of it, where packages are installed."""
    named = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    user = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    paths = [*named, *user, *site.getsitepackages()]
    spec = PathFinder.find_spec(_PACKAGE.name, paths)
    for finder in sys.meta_path:  # of an editable install
        if spec is None and "__editable__" in getattr(finder, "__module__", ""):
            spec = finder.find_spec(_PACKAGE.name, None)
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve().parent == _PACKAGE


def package_root() -> Path:
    """The folder that the package lies in."""
    return _PACKAGE.parent
