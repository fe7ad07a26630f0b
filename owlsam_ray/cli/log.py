"""The log of a command: on a terminal in colour, elsewhere plain lines with the time."""

import logging

from rich.console import Console
from rich.logging import RichHandler

from owlsam_ray.parallel.logs import SafeFormatter, stderr_handler


def start_log(console: Console, level: str) -> None:
    """Send the log to stderr, from a level on (`info`, `debug`, …)."""
    if console.is_terminal:
        handler: logging.Handler = RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S")
        handler.setFormatter(SafeFormatter("%(message)s"))
    else:
        handler = stderr_handler("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
    ours = logging.getLogger("owlsam_ray")
    ours.handlers = [handler]
    ours.setLevel(level.upper())
    ours.propagate = False
