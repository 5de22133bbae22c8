"""One run at a time in a working folder: two would remove each other's checkpoints and records."""

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

from moth_jax.errors import InputError
from moth_jax.parallel.processes import broadcast_from_main

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

_NAME = ".lock"
_WAIT_SECONDS = 10.0  # a process that was killed may take some to give its devices back
_RETRY_SECONDS = 0.1
_HELD = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keep other runs out of `workdir`, which is made, while the block runs.

    The process that writes holds the lock, and the system takes it back when that process ends, in
    whatever way. Where the file system knows no locks there is none.

    Raises:
      InputError: another run has the folder, or it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        broadcast_from_main(_lock, workdir, stack)
        yield


def make_folder(workdir: Path) -> None:
    """Make the folder unless it is there."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot use {workdir} as --workdir: {error.strerror}") from error


def _lock(workdir: Path, stack: contextlib.ExitStack) -> None:
    """Lock `workdir` until `stack` is closed."""
    make_folder(workdir)
    if fcntl is None:
        return
    # The file stays: whoever removed it could take it from under one that has just opened it.
    # Closed in programs that this one starts (PEP 446), so that none of them keeps the lock.
    file = os.open(workdir / _NAME, os.O_RDWR | os.O_CREAT, 0o666)
    stack.callback(os.close, file)
    deadline = time.monotonic() + _WAIT_SECONDS
    while not _taken(file):
        if time.monotonic() >= deadline:
            raise InputError(
                f"another process works in {workdir}; wait for it or choose another --workdir; for "
                "several processes together give --coordinator"
            )
        time.sleep(_RETRY_SECONDS)


def _taken(file: int) -> bool:
    """Whether this process holds the lock now, or can have none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno not in _NO_LOCKS:
            raise
    return True
