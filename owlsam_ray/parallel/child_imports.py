"""Keep Python child processes from importing modules that happen to be in the working directory.

A user's own `statistics.py` or folder `timm` beside the run file must not be imported in place of a library. Python
puts the working directory first on the path of `python -m` and `python -c`, and Ray puts it first on its workers' path.
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
    """Python processes started inside this context leave the working directory out of their path."""
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
    """Environment variables for a Python child that finds this very package, and nothing in its working directory.

    Args:
        folder: a private folder of the caller; the package is linked into it if a new process would not find it.
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
    """Whether a new Python process finds this package, and not another copy of it, where packages are installed."""
    named = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    user = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    paths = [*named, *user, *site.getsitepackages()]
    spec = PathFinder.find_spec(_PACKAGE.name, paths)
    for finder in sys.meta_path:  # those of editable installs
        if spec is None and "__editable__" in getattr(finder, "__module__", ""):
            spec = finder.find_spec(_PACKAGE.name, None)
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve().parent == _PACKAGE


def package_root() -> Path:
    """The folder that contains the package."""
    return _PACKAGE.parent
