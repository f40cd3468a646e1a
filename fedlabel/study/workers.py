"""Jobs in worker processes that end when their parent ends, in any way."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, NoReturn, TypeVar

from fedlabel.errors import RunError, file_error

Job = TypeVar("Job")
Tell = Callable[[Any], None]
"""Sends a message about the job under way to the parent."""

PATIENCE = 10.0
"""Seconds that a worker has to clean up after SIGTERM before it is killed."""


def run_parallel(
    work: Callable[[Job, Tell], None],
    count: int,
    take: Callable[[], Job | None],
    on_message: Callable[[Job, Any], None],
    finished: Callable[[Job, str], None],
) -> None:
    """Runs jobs in up to `count` processes at a time, until none runs and `take` has none.

    Not `concurrent.futures`: its workers outlive a parent that is killed, and one that dies breaks the whole pool.

    Args:
        work: runs a job in a worker; a function of a module (it is sent by name). What it raises fails the job alone.
        count: number of processes; each runs many jobs.
        take: returns the next job to start, or None; asked again after every job that finished.
        on_message: called with a job and each message that its `work` sends.
        finished: called with a job and "" or what went wrong: the message of a ValueError or RunError, a traceback of
            everything else, or that the process died.
    """
    idle: list[_Worker[Job]] = []
    busy: dict[Connection, _Worker[Job]] = {}
    try:
        while True:
            while len(busy) < count and (job := take()) is not None:
                worker = idle.pop() if idle else _start(work)
                worker.job = job
                busy[worker.connection] = worker
                worker.send(job)
            if not busy:
                return
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                assert worker.job is not None
                kind, value = worker.receive()
                if kind == "message":
                    on_message(worker.job, value)
                    continue
                del busy[worker.connection]
                if kind == "finished":
                    idle.append(worker)
                finished(worker.job, value)
    finally:
        for worker in [*idle, *busy.values()]:
            worker.process.terminate()
        for worker in [*idle, *busy.values()]:
            worker.stop()


@dataclass(eq=False)
class _Worker(Generic[Job]):
    """The parent's end of one worker."""

    process: SpawnProcess
    connection: Connection
    job: Job | None = None

    def send(self, job: Job) -> None:
        try:
            self.connection.send(job)
        except OSError:  # it died while idle; `receive` says so
            return

    def receive(self) -> tuple[str, Any]:
        """Returns ("message", value), ("finished", error) or ("died", error)."""
        try:
            message: tuple[str, Any] = self.connection.recv()
            return message
        except (EOFError, OSError):
            self.stop()
            return (
                "died",
                f"its process ended with exit status {self.process.exitcode}; was it killed, or out of memory?",
            )

    def stop(self) -> None:
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


def _start(work: Callable[..., None]) -> _Worker[Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(work, theirs), daemon=True)
    # Inherited: Ctrl-C, which reaches the whole terminal, is the parent's to handle; and a file of the working
    # directory that is called like one of Python's modules is not to be imported in its place.
    with _interrupt_ignored(), _safe_path():
        process.start()
    theirs.close()  # so that the death of the worker is the end of the pipe
    return _Worker(process, ours)


@contextmanager
def _safe_path() -> Iterator[None]:
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


@contextmanager
def _interrupt_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(work: Callable[[Any, Tell], None], connection: Connection) -> None:
    """The loop of a worker: one job after the other until the parent closes the pipe, sends SIGTERM, or is gone."""
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        error = ""
        try:
            work(job, lambda message: connection.send(("message", message)))
        except Exception as caught:
            if isinstance(caught, OSError) and caught.filename is not None:
                caught = file_error(caught)
            error = str(caught) if isinstance(caught, (ValueError, RunError)) else traceback.format_exc()
        connection.send(("finished", error))


def _leave(*_: object) -> NoReturn:
    sys.exit(1)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # at once: what a run writes survives a kill at any moment
