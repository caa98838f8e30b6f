"""Tasks that processes and clusters can import."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np


def slow_at_first(n: int) -> int:
    time.sleep(0.003 * (5 - n % 5))
    return n * n


def noted(folder: Path, seconds: float, n: int) -> int:
    """Note that a task has begun, by whom, and that it has ended."""
    (folder / f"{n}.begun.{os.getpid()}").touch()
    time.sleep(seconds)
    (folder / f"{n}.ended").touch()
    return n * n


def failing(folder: Path, number: int, error: Exception, n: int) -> int:
    if n == number:
        raise error
    return noted(folder, 0.02, n)


def sized(n: int) -> bytes:
    return bytes(n)


def unsendable(n: int) -> Any:
    return threading.Lock()


class StrangeError(Exception):
    def __reduce__(self) -> str:
        raise TypeError("no pickle")


def strange(n: int) -> None:
    raise StrangeError("what happened")


def warned(n: int) -> int:
    logging.getLogger("lorashare_stream.stages.fit").warning("module %s", n)
    return n


def threads_of_blas(n: int) -> set[int]:
    import scipy.linalg.cython_blas  # noqa: F401
    from threadpoolctl import threadpool_info

    np.ones((200, 200)) @ np.ones((200, 200))
    return {lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"}


def killed_at(numbers: tuple[int, ...], n: int) -> int:
    if n in numbers:
        time.sleep(0.2)  # others have begun theirs
        os.kill(os.getpid(), signal.SIGKILL)
    return n


def eigenproblem(folder: Path, n: int) -> None:
    """Seconds in SciPy, which holds the interpreter's lock."""
    import scipy.linalg

    matrix = np.random.default_rng(0).random((4096, 4096), dtype=np.float32)  # its lower half counts
    (folder / f"{n}.begun.{os.getpid()}").touch()
    scipy.linalg.eigh(matrix)
    (folder / f"{n}.ended").touch()
