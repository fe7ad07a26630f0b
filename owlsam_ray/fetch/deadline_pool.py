"""A thread pool whose caller stops waiting after `deadline_s` without progress and abandons stuck threads.

A thread that hangs in a system call, such as a read from a dead network file system, cannot be ended. The threads are
therefore daemons: unlike the threads of `ThreadPoolExecutor`, they do not keep the process from exiting.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
Task = Callable[[], Iterable[T]]
"""Yields results; each one also shows that the task is making progress."""

MOST_THREADS = 256
"""Limit on the threads of all pools of a process, abandoned ones included. A pool that gets no thread waits for one to
be released, at most one deadline. Unresponsive storage thus costs each pool one deadline, however many threads hang,
and the threads become available again as soon as the storage responds."""
_thread_slots = threading.BoundedSemaphore(MOST_THREADS)


class StalledError(Exception):
    """No task has made progress within the deadline."""


class DeadlinePool(Generic[T]):
    """Runs the tasks of one caller in threads."""

    def __init__(self, threads: int, *, deadline_s: float | None) -> None:
        """Create the pool; no thread is started yet.

        Args:
            threads: maximum number of threads that run at once.
            deadline_s: seconds without progress after which the caller gives up; None: never.
        """
        self._threads, self._deadline_s = max(1, threads), deadline_s
        self._lock = threading.Lock()  # guards the attributes below
        self._waiting: deque[Task[T]] = deque()
        self._unfinished = 0
        self._at_work = 0
        self._given_up = False
        self._events: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()

    def add(self, task: Task[T]) -> None:
        """Queue a task. A task may queue further tasks."""
        with self._lock:
            if self._given_up:
                return
            self._waiting.append(task)
            self._unfinished += 1
            has_slot = self._at_work < self._threads and _thread_slots.acquire(blocking=False)
            self._at_work += has_slot
        if has_slot:
            self._start_thread()

    def results(self) -> Iterator[T]:
        """Yield the results of the tasks as they arrive.

        Raises:
            StalledError: the deadline has passed; stuck threads are abandoned and queued tasks are dropped.
            BaseException: the exception that a task raised; the other tasks are abandoned.
        """
        try:
            while self._unfinished:
                if self._waiting and not self._at_work:
                    if not _thread_slots.acquire(timeout=self._deadline_s):
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
        """Start one more thread, whose slot is already taken and counted."""
        try:
            threading.Thread(target=self._work, name="owlsam-fetch", daemon=True).start()
        except BaseException:
            _thread_slots.release()
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
            _thread_slots.release()

    def _next_task(self) -> Task[T] | None:
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            self._at_work -= 1
            return None
