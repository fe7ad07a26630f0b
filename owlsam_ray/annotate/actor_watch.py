"""Watch an actor's work: in-hand markers for when it dies, and a watchdog against hangs and memory overruns."""

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator

from owlsam_ray.config.resources import ResourcesConfig
from owlsam_ray.inference.watchdog import Overrun, Watchdog
from owlsam_ray.parallel.allocation import actor_memory_bytes
from owlsam_ray.parallel.logs import safe_lines
from owlsam_ray.parallel.work_slots import WorkSlots, remove_old_slot_files
from owlsam_ray.run import in_hand
from owlsam_ray.run.in_hand import InHandMarker

EXIT_CODE = 70


class WatchedWork:
    """Keeps the work slots of a process, and ends the process if an image hangs or uses too much memory."""

    def __init__(self, run_url: str, attempt: str, resources: ResourcesConfig) -> None:
        """Start watching.

        Args:
            run_url: the run directory.
            attempt: name of the attempt that this process works for.
            resources: deadline per image and memory limit of an actor.
        """
        self._run_url, self._attempt = run_url, attempt
        self._worker = in_hand.new_worker_name()
        self._in_hand: dict[int, InHandMarker] = {}
        self._shards = 0
        self._lock = threading.Lock()
        remove_old_slot_files()
        self.slots = WorkSlots()
        self.slots.remove_file()  # it exists only during work: Ray ends idle actors without notice
        Watchdog(
            self.slots,
            deadline_s=resources.image_deadline_s,
            memory_bytes=actor_memory_bytes(resources),
            on_overrun=self._end_process,
        ).start()

    @contextlib.contextmanager
    def in_hand(self, shard: int) -> Iterator[None]:
        """Keep a marker while a shard is worked on, and the slot file while any shard is."""
        with self._lock:
            if self._shards == 0:
                self.slots.renew()
            self._shards += 1
        marker = InHandMarker(
            shard=shard,
            worker=self._worker,
            attempt=self._attempt,
            host=socket.gethostname(),
            notes=str(self.slots.path),
        )
        try:
            with in_hand.held(self._run_url, marker):
                with self._lock:
                    self._in_hand[shard] = marker
                try:
                    yield
                finally:
                    with self._lock:
                        del self._in_hand[shard]
        finally:
            with self._lock:
                self._shards -= 1
                if self._shards == 0:
                    self.slots.remove_file()

    def _end_process(self, overrun: Overrun) -> None:
        """Write the overrun to the markers, if storage allows it within 10 s, and end the process."""

        def write_markers() -> None:
            with self._lock:
                held = list(self._in_hand.values())
            for marker in held:
                found = {"image_ids": overrun.image_ids, "reason": overrun.reason}
                in_hand.write(self._run_url, marker.model_copy(update=found))

        writing = threading.Thread(target=write_markers, daemon=True)
        writing.start()
        writing.join(timeout=10)
        print(f"owlsam: this process stops: {safe_lines(overrun.reason)}", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)
