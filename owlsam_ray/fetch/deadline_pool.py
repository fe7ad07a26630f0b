"""Calls in threads that may hang: whoever waits for them gives up after a silence, and leaves them behind.

Nothing can end a thread that hangs in a system call, as a read from a dead network file system does. So the threads are
daemons, which a process does not wait for when it ends, unlike those of `ThreadPoolExecutor`.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
Task = Callable[[], Iterable[T]]
"""What it yields are its results, and signs of life."""

MOST_THREADS = 256
"""Threads of all crews of a process, those that were left behind included. A crew that gets none waits for one that
comes back, as long as it would wait for an answer: storage that does not answer costs each crew one deadline, however
many threads hang, and as soon as it answers again they are there again."""
_room = threading.BoundedSemaphore(MOST_THREADS)


class StalledError(Exception):
    """For so long, no task has given a sign of life."""


class DeadlinePool(Generic[T]):
    """Threads for the tasks of one caller."""

    def __init__(self, threads: int, *, deadline_s: float | None) -> None:
        """Start no thread yet.

        Args:
            threads: at once, at most.
            deadline_s: seconds of silence until the caller gives up; None: never.
        """
        self._threads, self._deadline_s = max(1, threads), deadline_s
        self._lock = threading.Lock()  # of what follows
        self._waiting: deque[Task[T]] = deque()
        self._unfinished = 0
        self._at_work = 0
        self._given_up = False
        self._events: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()

    def add(self, task: Task[T]) -> None:
        """Hand over a task. A task may hand over others as well."""
        with self._lock:
            if self._given_up:
                return
            self._waiting.append(task)
            self._unfinished += 1
            hired = self._at_work < self._threads and _room.acquire(blocking=False)
            self._at_work += hired
        if hired:
            self._start_thread()

    def results(self) -> Iterator[T]:
        """What the tasks yield, as it comes.

        Raises:
            StalledError: the deadline has passed; threads that hang are left behind, tasks that wait are dropped.
            BaseException: what a task raised; the others are left behind.
        """
        try:
            while self._unfinished:
                if self._waiting and not self._at_work:
                    if not _room.acquire(timeout=self._deadline_s):
                        raise StalledError
                    self._at_work = 1
                    self._start_thread()
                try:
                    event = self._events.get(timeout=self._deadline_s)
                except queue.Empty:
                    raise StalledError from None
                if event is None:
                    with self._lock:
                        self._unfinished -= 1
                elif isinstance(event, tuple):
                    yield event[0]
                else:
                    raise event
        finally:
            with self._lock:
                self._given_up = True
                self._waiting.clear()

    def _start_thread(self) -> None:
        """One more, for which there is room, and which is counted already."""
        try:
            threading.Thread(target=self._work, name="owlsam-fetch", daemon=True).start()
        except BaseException:
            _room.release()
            raise

    def _work(self) -> None:
        try:
            while (task := self._next_task()) is not None:
                for result in task():
                    if self._given_up:
                        return
                    self._events.put((result,))
                self._events.put(None)
        except BaseException as error:  # noqa: BLE001 (raised again in the caller)
            self._events.put(error)
        finally:
            _room.release()

    def _next_task(self) -> Task[T] | None:
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            self._at_work -= 1
            return None
