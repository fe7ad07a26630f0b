"""An evaluation for people."""

from typing import Any

from rich.console import Group, RenderableType


def evaluation_table(evaluation: dict[str, Any]) -> RenderableType:
    """Tables of an evaluation as `evaluate_run` returns it; "–" stands for what is not defined."""
    return Group()
