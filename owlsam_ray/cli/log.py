"""A command's log on stderr: coloured on a terminal, plain lines with the time elsewhere."""

import logging

from rich.console import Console
from rich.logging import RichHandler

from owlsam_ray.parallel.logs import SafeFormatter, stderr_handler


def start_log(console: Console, level: str) -> None:
    """Send log messages of at least this level (`info`, `debug`, …) to stderr."""
    if console.is_terminal:
        handler: logging.Handler = RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S")
        handler.setFormatter(SafeFormatter("%(message)s"))
    else:
        handler = stderr_handler("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
    ours = logging.getLogger("owlsam_ray")
    ours.handlers = [handler]
    ours.setLevel(level.upper())
    ours.propagate = False
