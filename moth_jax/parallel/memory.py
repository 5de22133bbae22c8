"""How much work fits in a device's memory, and what to do when it does not.

XLA plans all buffers of a compiled program, so its need is known before it runs. If memory runs out
all the same, because another process took it, the work is halved and goes on.
"""

import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np

from moth_jax.errors import InputError
from moth_jax.parallel.devices import num_devices

Result = TypeVar("Result")
_SHARE = 0.9  # of the free memory is planned with: allocators need some room of their own
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def program_bytes(compiled: jax.stages.Compiled) -> float:
    """Return the bytes that a compiled program needs on each device; 0 if that is not known."""
    plan = compiled.memory_analysis()
    if plan is None:
        return 0
    parts = plan.argument_size_in_bytes, plan.output_size_in_bytes, plan.temp_size_in_bytes
    return sum(parts) - plan.alias_size_in_bytes


def free_bytes() -> float:
    """Return the bytes free on the fullest device, of all processes; infinite if not known.

    The "devices" of a CPU share the memory of the host.
    """
    devices = jax.local_devices()
    stats = [device.memory_stats() for device in devices]
    if jax.default_backend() == "cpu":
        free = host_free_bytes() / max(1, num_devices() // jax.process_count())
    elif all(stats):
        free = min(each["bytes_limit"] - each["bytes_in_use"] for each in stats)
    else:
        free = np.inf
    if jax.process_count() > 1:  # all have to come to the same sizes
        from jax.experimental import multihost_utils

        free = multihost_utils.process_allgather(np.float32(free)).min()
    return float(_SHARE * free)


def host_free_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> float:
    """Return the bytes that this process may still take from the host; infinite if not known."""
    free = [np.inf]
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        if "MemAvailable" in lines:
            free.append(1024.0 * int(lines["MemAvailable"].split()[0]))
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        free.append(float(limit.read_text()) - float(used.read_text()) + _droppable(cgroup))
    return min(free)


def _droppable(cgroup: Path) -> float:
    """Return the used bytes that only hold files read before: Linux drops them at need."""
    stat = cgroup / "memory.stat"
    counts = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    return float(counts.get("inactive_file", 0))


def equal(size: int, count: int) -> int:
    """Return the size of equal chunks of `count` things, as few as chunks of `size` would be.

    The last chunk is filled up with repeats; of equal chunks it needs few. The result is below the
    number of devices, or a multiple of it. It is no larger than `size` if that is so for `size`.

    >>> [equal(80, 90), equal(80, 10), equal(100, 90)]
    [45, 10, 90]
    """
    if not count:
        return size
    devices = num_devices()
    size = -(-count // -(-count // size))
    return size if size < devices else -(-size // devices) * devices


def _as_it_is(size: int) -> int:
    return size


def fitting_size(
    wanted: int,
    needed: Callable[[int], float],
    free: float,
    rounded: Callable[[int], int] = _as_it_is,
) -> int:
    """Return the largest size up to `wanted` that is known to fit, at least 1.

    Args:
      wanted: the size that would be best.
      needed: size -> bytes; called for as few sizes as possible, since each is a compilation.
      free: bytes.
      rounded: size -> a better size, no larger, which is tried and returned instead.

    >>> fitting_size(96, lambda size: 10 + 2 * size, 100)
    45
    """
    size = rounded(wanted)
    while size > 1:
        try:
            bytes_needed = needed(size)
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            if not is_exhausted(error):
                raise
            size = rounded(smaller(size))
            continue
        if bytes_needed <= free:
            break
        # In proportion, as if all memory grew with the size: a little less than would fit.
        size = rounded(_whole(min(size * free / bytes_needed, size - 1)))
    return size


def smaller(size: int) -> int:
    """Return the next size to try: half, as a multiple of the devices where there are enough.

    >>> [smaller(size) for size in (96, 3, 2)]
    [48, 1, 1]
    """
    return _whole(size / 2)


def _whole(size: float) -> int:
    devices = num_devices()
    whole = int(size)
    return max(1, whole - whole % devices if whole >= devices else whole)


def halving(
    run: Callable[[int], Result],
    size: int,
    *,
    advice: str,
    rounded: Callable[[int], int] = _as_it_is,
) -> tuple[Result, int]:
    """Return `run(size)` and its size, which is halved whenever memory runs out.

    `rounded` gives a better size, no larger, for the work left after a halving.

    Raises:
      InputError: it does not fit with a size of 1 either; the message ends with `advice`.
    """
    while True:
        try:
            return run(size), size
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            if not is_exhausted(error):
                raise
            # Other processes would wait for this one's part of what they do together.
            if jax.process_count() > 1:
                advice = f"set directions_per_chunk below that, or {advice}"
            if size == 1 or jax.process_count() > 1:
                raise InputError(f"out of memory with {size} at a time; {advice}") from error
        # Outside the handler, for the error holds what was allocated.
        gc.collect()
        exhausted, size = size, rounded(smaller(size))
        warnings.warn(
            f"out of memory with {exhausted} at a time, going on with {size}", stacklevel=2
        )


def is_exhausted(error: Exception) -> bool:
    """Whether `error` says that memory has run out."""
    return isinstance(error, MemoryError) or str(error).startswith("RESOURCE_EXHAUSTED")
