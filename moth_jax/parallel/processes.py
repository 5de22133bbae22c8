"""Several processes, on one host or many: the same command in each, in step.

Every process runs the whole program, makes the same random draws and comes to the same decisions;
arrays are cut among the devices of all (`devices`). Process 0 is the *main* one. It alone reads and
writes the working folder and tells the others what it read, so the folder need not be seen by them
and cannot look different to them: a run goes on wherever its folder is, on any number of processes.

    processes.initialise()                     # before JAX is used
    matrix = broadcast_from_main(DistanceMatrix.load, path)
    on_main(matrix.save, path)
"""

import hashlib
import os
import pickle
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np

from moth_jax.errors import InputError

T = TypeVar("T")

# Lengths are rounded up to a power of two: each needs a compilation.
_LEAST_BYTES, _MOST_BYTES = 2**10, 2**26
_LAST_SECONDS = 1.0
# Of the launchers that JAX knows: how many processes they have started.
_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


def initialise(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> bool:
    """Join the other processes: those given, or of the cluster that JAX finds itself in, if any.

    Must be called before JAX is first used.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: of the run; 1 means to stay alone, also in a cluster.
      process_id: 0 to num_processes - 1, another one in each.

    Returns:
      Whether there are other processes.

    Raises:
      InputError: some are given and others not, or they are impossible, or no process answers.
    """
    given = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [f"--{name}" for name, value in given.items() if value is None]
    # JAX would leave a single process one accelerator of a host that has several.
    alone = len(missing) == 3 and any(os.environ.get(name) == "1" for name in _COUNTS)
    if num_processes == 1 or alone:
        return False
    if 0 < len(missing) < 3:
        raise InputError(
            "--coordinator=HOST:PORT, --num_processes and --process_id go together; not given: "
            f"{', '.join(missing)}"
        )
    if coordinator is not None and num_processes is not None and process_id is not None:
        _check(coordinator, num_processes, process_id)
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            shutdown_timeout_seconds=60,
        )
    except (ValueError, RuntimeError) as error:
        # That is how JAX says that there is no cluster.
        if missing and str(error).startswith("coordinator_address should be defined"):
            return False
        raise InputError(
            f"cannot join the other processes: {error}; start the same command once for each, or "
            "set --num_processes=1"
        ) from error
    return True


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    if not re.fullmatch(r".+:\d+", coordinator):
        raise InputError(f"coordinator must be HOST:PORT of process 0, got {coordinator!r}")
    if num_processes < 1:
        raise InputError(f"num_processes must be at least 1, got {num_processes}")
    if not 0 <= process_id < num_processes:
        raise InputError(f"process_id must be in 0..{num_processes - 1}, got {process_id}")


def leave(code: int) -> None:
    """End this process at once: the others may never come to where it would wait for them."""
    if is_main():
        time.sleep(_LAST_SECONDS)  # without it the others end; they may have the same to say
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_main() -> bool:
    """Whether this process writes: process 0 does, which may be the only one."""
    return jax.process_index() == 0


def on_main(action: Callable, *arguments) -> None:
    """Do `action(*arguments)` in the writer; the others go on without waiting."""
    if is_main():
        action(*arguments)


def broadcast_from_main(read: Callable[..., T], *arguments) -> T:
    """Return what `read(*arguments)` returns in the writer, or raise its `InputError`, everywhere.

    All processes must call it, and only the writer calls `read`.
    """
    if jax.process_count() == 1:
        return read(*arguments)
    answer = None, None
    if is_main():
        try:
            answer = read(*arguments), None
        except (InputError, OSError) as fault:
            answer = None, fault
    value, fault = pickle.loads(_broadcast(pickle.dumps(answer)))
    if fault is not None:
        raise fault
    return value


def load_if_exists(load: Callable[[Path], T], path: Path) -> T | None:
    """Return what `load(path)` returns in the writer, everywhere; None if `path` does not exist."""
    return broadcast_from_main(lambda: load(path) if path.exists() else None)


def smallest(value: int) -> int:
    """Return the smallest `value` of all processes; all must call it."""
    return int(_gathered(np.asarray([value])).min())


def check_same(what: str, *values) -> None:
    """Raise `InputError` in every process unless all have the same `values` (arrays, or text)."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(
            value.encode() if isinstance(value, str) else np.ascontiguousarray(value).data
        )
    digests = _gathered(np.frombuffer(digest.digest(), np.uint8))
    others = np.flatnonzero((digests != digests[0]).any(1)).tolist()
    if others:
        raise InputError(
            f"{what} must be the same in all {len(digests)} processes; another one than in process "
            f"0 is in {', '.join(map(str, others))}"
        )


def _gathered(values: np.ndarray) -> np.ndarray:
    """Return the `values` [n] of every process [processes, n]."""
    if jax.process_count() == 1:
        return values[None]
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(values)


def _broadcast(message: bytes) -> bytes:
    """Return the writer's `message`, in parts, after its length."""
    from jax.experimental.multihost_utils import broadcast_one_to_all

    # In two parts: JAX has no 64 bits unless told so.
    high, low = broadcast_one_to_all(np.asarray(divmod(len(message), 2**32), np.uint32))
    length = (int(high) << 32) + int(low)
    parts = []
    for first in range(0, length, _MOST_BYTES):
        count = min(length - first, _MOST_BYTES)
        part = np.zeros(max(_LEAST_BYTES, 1 << (count - 1).bit_length()), np.uint8)
        if is_main():
            part[:count] = np.frombuffer(message, np.uint8, count, first)
        parts.append(broadcast_one_to_all(part)[:count].tobytes())
    return b"".join(parts)
