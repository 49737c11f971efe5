"""Cases in a process beside this one: a kernel that breaks the device's context, ends its process or never returns
costs its own case, and the next ones find a fresh process."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

Run = Callable[..., Any]  # a function that another process can import, whose arguments and result can be pickled


def device_is_lost(device: torch.device) -> bool:
    """Whether a kernel has failed such that nothing more will run there in this process."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


class Apart:
    """Calls ``run(case, device, **options)`` in the other process, which is there from the first call until `close`.

    Raises what `run` raised, as a RuntimeError unless the device had no more memory; also where the process ended, or
    gave no result within `seconds`.
    """

    def __init__(self, run: Run, seconds: float | None = None) -> None:
        self._run, self._seconds = run, seconds
        self._context = multiprocessing.get_context("spawn")  # a device does not survive a fork
        self._process: Any = None
        self._connection: Connection

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self._process is None or not self._process.is_alive():
            self._start()
        try:
            self._connection.send((arguments, options))
            if not self._connection.poll(self._seconds):
                self.close()
                raise RuntimeError(f"no result after {self._seconds:.0f} s")
            answer = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join()
            raise RuntimeError(f"its process ended with {self._process.exitcode}") from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _start(self) -> None:
        self.close()
        self._connection, theirs = self._context.Pipe()
        self._process = self._context.Process(
            target=_serve, args=(theirs, self._run, torch.get_num_threads()), daemon=True
        )
        self._process.start()
        theirs.close()  # so that the end of that process is seen here

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None


def _serve(connection: Connection, run: Run, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks may be interrupted, and then ends this process
    torch.set_num_threads(threads)
    lost = False
    while not lost:
        try:
            arguments, options = connection.recv()
        except EOFError:
            return
        answer: Any
        try:
            answer = run(*arguments, **options)
        except torch.OutOfMemoryError as error:
            answer = torch.OutOfMemoryError(str(error))
        except Exception as error:
            answer = RuntimeError(str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}")
            lost = any(device_is_lost(value) for value in arguments if isinstance(value, torch.device))
        connection.send(answer)
