"""How the processes of `benchmark.py` time what they do, and scale it up to the whole job.

The seconds of a call grow with its steps in a straight line, which two numbers of steps give.
"""

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable

# A direction as published, and a hardening: `MothConfig` and `pytorch_hardening.Options`.
NUM_IMAGES, STEPS = 100, 1000
NUM_CLASSES, WARMUP_STEPS, ROUND_STEPS, HARDEN_STEPS, PER_ROUND = 10, 500, (200, 50, 50), 782, 3
UNTIMED = 1  # of the warm-ups and rounds: the first compiles
# PyTorch gets memory for every activation from malloc. glibc by default returns blocks of this size
# to the system at once, and each step then faults in all of its pages anew, which can double
# PyTorch's time. Both sides run with the same setting, so that the kernel is not what is compared.
MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**32)}


def line(run: Callable[[int], object], num_steps: int, *, timed: int, repeats: int) -> dict:
    """Return what `run(num_steps)` takes, from runs of 1 and of `timed` steps; 0 runs it whole."""
    started = time.perf_counter()
    run(1)
    first = time.perf_counter() - started
    if timed == 0 or timed >= num_steps:
        return {**clock(lambda: run(num_steps)), "first_call_seconds": first, "timed_steps": "all"}
    calls = {n: [clock(lambda n=n: run(n)) for _ in range(repeats)] for n in (1, timed)}
    result = {"first_call_seconds": first, "timed_steps": timed}
    for name in ("seconds", "cpu_seconds"):
        one, many = (statistics.median(call[name] for call in calls[n]) for n in (1, timed))
        result[name] = on_line(one, many, timed, num_steps)
    return result


def on_line(one: float, many: float, timed: float, num_steps: float) -> float:
    """Return the value at `num_steps` of the line through (1, `one`) and (`timed`, `many`).

    >>> on_line(2.0, 3.0, 11, 101)
    12.0
    """
    return one + (many - one) / (timed - 1) * (num_steps - 1)


def clock(call: Callable[[], object]) -> dict:
    before, before_cpu = time.perf_counter(), time.process_time()
    call()
    return {
        "seconds": time.perf_counter() - before,
        "cpu_seconds": time.process_time() - before_cpu,
    }


def scaled(figures: dict, factor: float) -> dict:
    return {
        **figures,
        **{name: factor * figures[name] for name in ("seconds", "cpu_seconds")},
    }


def hardening(run: Callable[[int], dict[str, list[dict]]], timed: int) -> dict:
    """Return what a hardening takes, from two short ones.

    `run(n)` hardens with n steps in every inversion and returns what each target of the warm-up and
    each round took. A whole one is projected for inversions that all succeed, as nearly all do: a
    round has 200, 50 and 50 steps.
    """
    parts = {n: run(n) for n in (1, timed)}
    result = {"timed_steps": timed, **outside(parts[1])}
    rounds = HARDEN_STEPS / PER_ROUND
    for name in ("seconds", "cpu_seconds"):
        one, many = (medians(parts[n], name) for n in (1, timed))
        warm_up = on_line(one["warm-up"], many["warm-up"], timed, WARMUP_STEPS)
        per_step = sum(ROUND_STEPS) / len(ROUND_STEPS)
        a_round = on_line(one["hardening"], many["hardening"], timed, per_step)
        result[name] = NUM_CLASSES * warm_up + rounds * a_round
        result[f"warm_up_{name}"] = NUM_CLASSES * warm_up
    return result


def outside(parts: dict[str, list[dict]]) -> dict:
    """Return what a hardening takes outside its inversions, from one with one step in each.

    Of the seconds of a whole one this is what better inversions do not change: samples, training
    steps, selection, verified triggers, and whatever the host does between two calls.
    """
    rounds = HARDEN_STEPS / PER_ROUND
    result = {}
    for name in ("seconds", "cpu_seconds"):
        taken = medians(parts, name)
        result[f"outside_{name}"] = NUM_CLASSES * taken["warm-up"] + rounds * taken["hardening"]
    return result


def medians(parts: dict[str, list[dict]], unit: str) -> dict[str, float]:
    """Return what a target of the warm-up and what a round takes, without the first, in `unit`."""
    return {
        part: statistics.median(lap[unit] for lap in laps[UNTIMED:]) for part, laps in parts.items()
    }


class Laps:
    """Seconds between calls, by phase."""

    def __init__(self):
        self.parts: dict[str, list[dict]] = {}
        self._last = time.perf_counter(), time.process_time()

    def __call__(self, phase: str) -> None:
        now = time.perf_counter(), time.process_time()
        spent = {"seconds": now[0] - self._last[0], "cpu_seconds": now[1] - self._last[1]}
        self.parts.setdefault(phase, []).append(spent)
        self._last = now


def finite(size: float) -> float | None:
    """Return what JSON can hold of a size: None where no trigger was found."""
    return size if math.isfinite(size) else None


def first_directions(count: int) -> list[tuple[int, int]]:
    """Return `count` of the 90 directions, from as many victims as can be."""
    pairs = [(a, (a + shift) % NUM_CLASSES) for shift in range(1, 10) for a in range(NUM_CLASSES)]
    return pairs[:count]


def budgets(num_steps: int) -> dict:
    """Return the options of a hardening with `num_steps` in every inversion; 0: as published."""
    if num_steps == 0:
        return {}
    return dict.fromkeys(("warmup_steps", "first_steps", "next_steps"), num_steps)


def num_updates(num_steps: int) -> int:
    """Return its training steps."""
    return 4 * PER_ROUND if num_steps else HARDEN_STEPS


def peak_memory() -> dict:
    """Return the largest memory that this process held, in MB: on the host and on devices."""
    peaks = {"host_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if "jax" in sys.modules:
        stats = [device.memory_stats() for device in sys.modules["jax"].local_devices()]
        if all(stats):
            peaks["device_mb"] = max(s["peak_bytes_in_use"] for s in stats) / 2**20
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peaks["device_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return {"peak_memory": peaks}


def with_ratios(rows: dict) -> dict:
    """Return the rows, each with how many times faster it is than the fastest PyTorch."""
    for unit in ("seconds", "cpu_seconds"):
        fastest = min(row[unit] for name, row in rows.items() if name.startswith("PyTorch"))
        for row in rows.values():
            row[f"times_faster_{unit}"] = fastest / row[unit]
    return rows


def check_load(load: float, cores: int, anyway: bool) -> None:
    """Refuse a machine that others use."""
    if load <= 0.25 * cores:
        return
    said = f"others use this machine (load {load:.1f} on {cores} cores): its times will not hold"
    if not anyway:
        sys.exit(f"{said}; wait until it is idle, or add --anyway and look at CPU seconds only")
    print(f"Note: {said}; look at CPU seconds only.")
