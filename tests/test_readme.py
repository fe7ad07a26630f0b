"""The READMEs: links and anchors resolve, every command is named, named files exist, pages stay short."""

import argparse
import re
import subprocess
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

from owlsam_ray.cli.parser import make_parser

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "owlsam_ray"
READMES = sorted(
    [
        ROOT / "README.md",
        *(page for top in ("cluster", "jobs", "owlsam_ray", "tests") for page in (ROOT / top).rglob("README.md")),
    ]
)
"""All of the repository; environments and caches lie elsewhere."""
ROOM_README_LINES = 150


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def without_code(text: str) -> str:
    """Markdown without fenced blocks: a `#` there is no heading, a bracket no link."""
    return re.sub(r"^ *(```+).*?^ *\1 *$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchor_of(heading: str) -> str:
    """The anchor that GitHub gives a heading: link texts without targets, lower case, no punctuation, dashes."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def anchors_in(text: str) -> set[str]:
    """Anchors of all headings; GitHub numbers the ones that repeat."""
    found: set[str] = set()
    seen: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", without_code(text), re.MULTILINE):
        anchor = anchor_of(heading)
        count = seen[anchor] = seen.get(anchor, -1) + 1
        found.add(f"{anchor}-{count}" if count else anchor)
    return found


@cache
def anchors_of(path: Path) -> frozenset[str]:
    return frozenset(anchors_in(path.read_text(encoding="utf-8")))


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links of a page, and anchors, that lead nowhere."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", without_code(text))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / unquote(path)).resolve() if path else page
        is_whole = file.exists() and (not anchor or (file.suffix == ".md" and anchor in _anchors(file, page, text)))
        if not is_whole or not file.is_relative_to(ROOT):
            broken.append(target)
    return broken


def _anchors(file: Path, page: Path, text: str) -> frozenset[str] | set[str]:
    return anchors_in(text) if file == page else anchors_of(file)


def missing_files(text: str, files: set[str]) -> list[str]:
    """Python files of ours that a page names with a folder, and that do not exist; wildcards stand for any name."""
    named = re.findall(r"`([\w.*-]+/[\w/.*-]*\.py)`", text)
    return [
        name for name in named if not any(re.fullmatch(re.escape(name).replace(r"\*", "[^/]*"), file) for file in files)
    ]


def commands() -> list[str]:
    subparsers = next(each for each in make_parser()._actions if isinstance(each, argparse._SubParsersAction))
    return list(subparsers.choices)


@cache
def project_files() -> frozenset[str]:
    return frozenset(
        path.relative_to(ROOT).as_posix() for top in ("owlsam_ray", "tests") for path in (ROOT / top).rglob("*.py")
    )


def test_all_readmes_are_checked() -> None:
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "*README.md"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git checkout")
    assert {name_of(path) for path in READMES} == {name for name in listed.stdout.split() if (ROOT / name).exists()}


@pytest.mark.parametrize("page", READMES, ids=name_of)
def test_links_and_anchors_resolve(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", READMES, ids=name_of)
def test_named_files_exist(page: Path) -> None:
    assert missing_files(page.read_text(encoding="utf-8"), set(project_files())) == []


@pytest.mark.parametrize("command", commands())
def test_the_readme_names_the_command(command: str) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"\bowlsam +{re.escape(command)}\b(?!-)", text)


def test_the_readme_is_short() -> None:
    content = (ROOT / "README.md").read_bytes()
    assert len(content.splitlines()) <= 300
    assert len(content) <= 22_000


@pytest.mark.parametrize(
    "page", [page for page in READMES if page not in (ROOT / "README.md", PACKAGE / "README.md")], ids=name_of
)
def test_a_room_fits_one_page(page: Path) -> None:
    assert len(page.read_text(encoding="utf-8").splitlines()) <= ROOM_README_LINES


def test_broken_links_are_found() -> None:
    text = (
        "## What happens when…\n[a](tests/README.md) [b](tests/nothing.md) [c](#what-happens-when) [d](#nothing)\n"
        "[e](tests/README.md#nothing) [f](https://example.com/x) [g](../README.md)\n```\n[h](nothing)\n```\n"
    )
    assert broken_links(ROOT / "README.md", text) == [
        "tests/nothing.md",
        "#nothing",
        "tests/README.md#nothing",
        "../README.md",
    ]


def test_missing_files_are_found() -> None:
    text = "`owlsam_ray/errors.py` `owlsam_ray/nothing.py` `tests/test_re*.py` `tests/zz*.py` `nothing.py`"
    assert missing_files(text, set(project_files())) == ["owlsam_ray/nothing.py", "tests/zz*.py"]


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [
        ("Suppression, tiles, masks", "suppression-tiles-masks"),
        ("What happens when…", "what-happens-when"),
        ("Mapping one dataset's categories", "mapping-one-datasets-categories"),
        ("`run`: the [run directory](run/README.md)", "run-the-run-directory"),
        ("How fast – in 10⁶ steps", "how-fast--in-10⁶-steps"),
    ],
)
def test_anchors_follow_github(heading: str, anchor: str) -> None:
    assert anchor_of(heading) == anchor


def test_repeated_headings_are_numbered() -> None:
    assert anchors_in("# a\n## b\n## b\n```\n# c\n```\n") == {"a", "b", "b-1"}
