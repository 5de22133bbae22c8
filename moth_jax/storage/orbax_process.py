"""A process beside the one that writes, in which Orbax runs: it belongs to no cluster.

Note: Orbax (v1 of 0.12) compares the path between all processes at every save, also where only one
  is told to be active. It would wait for processes that do not save, and here only one does. The
  helper takes calls from its standard input and ends with it.
"""

import functools
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import IO, TypeVar, cast

from moth_jax.errors import InputError

T = TypeVar("T")


class Helper:
    """A process that is started at the first call and ends with this one."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moth_jax.storage.orbax_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},  # the accelerator is taken
            start_new_session=True,  # what ends the writer must not end what it saves with
        )
        self._calls = cast("IO[bytes]", self._process.stdin)
        self._answers = cast("IO[bytes]", self._process.stdout)
        self._lock = threading.Lock()

    def __call__(self, function: Callable[..., T], *arguments) -> T:
        """Return `function(*arguments)`, or raise its `InputError`; one call at a time."""
        with self._lock:
            try:
                pickle.dump((function, arguments), self._calls)
                self._calls.flush()
                value, fault = pickle.load(self._answers)
            except (EOFError, BrokenPipeError) as error:
                raise InputError(
                    "the process that reads and writes checkpoints has ended; run the same "
                    "command again"
                ) from error
        if fault is not None:
            raise fault
        return value


@functools.cache
def helper() -> Helper:
    """Return the helper of this process."""
    return Helper()


def _serve() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            function, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = function(*arguments), None
        except InputError as fault:
            answer = None, fault
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    _serve()
