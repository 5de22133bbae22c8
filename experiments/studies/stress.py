"""Is a run that is killed again and again the run that is left alone?

    python experiments/studies/stress.py --out=experiments/results/stress/stress.json

Does the main job on the digits twice in one go (the first time compiles) and watches on the disk
how far it is. Then starts the same command anew, kills it at a random moment, starts it again,
kills it again, and so on. The moments are drawn from the work of the second run, uniformly over its
seconds: a process is left alone until it has come as far as that run had, and for the rest of the
moment. Some get SIGTERM, and must save and end with exit code 75; most get SIGKILL. At the end the
summary's figures, the record, weights and distances must be those of the first run, bit by bit.
"""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import app, flags

from moth_jax.distance.matrix import DistanceMatrix
from moth_jax.models.checkpoint import load_model
from moth_jax.run.console import EXIT_PREEMPTED, prepare_console
from moth_jax.run.origin import origin, processor

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "moth_jax.main", f"--config={ROOT / 'configs' / 'digits.py'}"]
# Every part of the main job for a few seconds.
BUDGET = [
    "training.epochs=20",
    "distance.num_steps=200",
    "distance.directions_per_chunk=6",
    "harden.max_steps=45",
    "harden.max_accuracy_drop=1.0",
    "robustness.epsilon=0.1",
    "checkpoint_seconds=0.5",
]
SHARE_OF_SIGTERM = 0.25
POLL_SECONDS = 0.005

# The folder of a run tells how far it is: the last of these that is there, and how much of it.
STAGES = [
    ("training", "metrics.jsonl"),
    ("distances before", "original"),
    ("warm-up and hardening", "distance_before.npz"),
    ("distances after", "hardened"),
    ("robustness and report", "distance_after.npz"),
]
MODELS = ("original", "hardened")
Place = tuple[int, int]  # (stage, how much of it)


class Moment(NamedTuple):
    """When to kill: so many `seconds` after a run has come to `place`, and how."""

    place: Place
    seconds: float
    signal: signal.Signals


class Kill(NamedTuple):
    """What happened: it `worked` so many seconds, and ended so many `seconds` after the signal."""

    stage: str
    place: Place
    signal: str
    worked: float
    code: int
    seconds: float


def place(workdir: Path) -> Place:
    """Return how far a run is: its stage, and the records and chunks of distances in it."""
    reached = [i for i, (_, name) in enumerate(STAGES) if (workdir / name).exists()]
    stage = max(reached, default=0)
    chunks = len(list(workdir.glob("distances/*.npz")))
    record = workdir / "metrics.jsonl"
    lines = record.read_bytes().count(b"\n") if record.exists() else 0
    return stage, chunks if STAGES[stage][0].startswith("distances") else lines


class Process:
    """The main command on a folder; `works` once it has said that it begins or goes on."""

    def __init__(self, workdir: Path, fields: list[str]):
        fields = [f"--config.{field}" for field in fields]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compilations"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.0",
        }
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (it lasts as long as this does)
        self._process = subprocess.Popen(
            [*COMMAND, f"--workdir={workdir}", *fields], stderr=self._said, env=environment
        )

    def ended(self) -> bool:
        return self._process.poll() is not None

    def works(self) -> bool:
        return os.fstat(self._said.fileno()).st_size > 0

    def end(self, number: signal.Signals | None = None) -> int:
        if number is not None:
            self._process.send_signal(number)
        return self._process.wait()

    def said(self) -> str:
        self._said.seek(0)
        return self._said.read().decode()


def uninterrupted(workdir: Path, fields: list[str]) -> list[tuple[float, Place]]:
    """Do the run in one go; return when it came to each place, in seconds of work."""
    process, seen = Process(workdir, fields), []
    while not process.ended():
        if process.works():
            now, here = time.perf_counter(), place(workdir)
            if not seen or here > seen[-1][1]:
                seen.append((now, here))
        time.sleep(POLL_SECONDS)
    if process.end():
        sys.exit(process.said())
    seen.append((time.perf_counter(), (len(STAGES), 0)))
    return [(now - seen[0][0], here) for now, here in seen]


def draw_moments(seen: list[tuple[float, Place]], kills: int, seed: int) -> list[Moment]:
    """Return `kills` moments in their order, uniform over the work of the uninterrupted run."""
    rng = np.random.default_rng(seed)
    seconds = np.sort(rng.uniform(0, seen[-1][0], kills))
    chosen = rng.random(kills) < SHARE_OF_SIGTERM
    times = [now for now, _ in seen]
    rows = np.searchsorted(times, seconds, side="right") - 1
    return [
        Moment(
            place=seen[row][1],
            seconds=float(at - times[row]),
            signal=signal.SIGTERM if politely else signal.SIGKILL,
        )
        for at, row, politely in zip(seconds, rows, chosen, strict=True)
    ]


def killed(workdir: Path, fields: list[str], moment: Moment) -> Kill:
    """Start the command, and end it at the moment; its exit code tells whether it came too late."""
    process = Process(workdir, fields)
    while not process.ended() and not process.works():
        time.sleep(POLL_SECONDS)
    began = time.perf_counter()
    while not process.ended() and place(workdir) < moment.place:
        time.sleep(POLL_SECONDS)
    # A machine that is less busy than it was may come further in these seconds.
    until = time.perf_counter() + moment.seconds
    while time.perf_counter() < until and place(workdir) <= moment.place:
        time.sleep(min(POLL_SECONDS, max(until - time.perf_counter(), 0.0)))
    here, sent = place(workdir), time.perf_counter()
    code = process.end(moment.signal)
    expected = EXIT_PREEMPTED if moment.signal == signal.SIGTERM else -signal.SIGKILL
    if code not in (expected, 0):
        sys.exit(f"exit code {code} on {moment}:\n{process.said()}")
    return Kill(
        stage=STAGES[here[0]][0],
        place=here,
        signal=moment.signal.name,
        worked=round(sent - began, 2),
        code=code,
        seconds=round(time.perf_counter() - sent, 2),
    )


def differences(ours: Path, theirs: Path) -> list[str]:
    """Return what is not the same in two finished runs, but for times."""

    def summary(workdir: Path) -> dict:
        figures = json.loads((workdir / "summary.json").read_text())
        return {name: value for name, value in figures.items() if not name.endswith("_seconds")}

    def record(workdir: Path) -> list[dict]:
        lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        own = ("time", "crc")  # of one run, and of the line with its time
        return [{k: v for k, v in line.items() if k not in own} for line in lines]

    def matrix(name: str):
        def arrays(workdir: Path) -> list:
            found = DistanceMatrix.load(workdir / name)
            return [found.values_per_seed, found.success_rate, *jax.tree.leaves(found.triggers)]

        return arrays

    parts = {
        "summary.json": summary,
        "metrics.jsonl": record,
        **{name: lambda w, name=name: load_model(w / name).variables for name in MODELS},
        **{name: matrix(name) for name in ("distance_before.npz", "distance_after.npz")},
        "files": lambda workdir: sorted(path.name for path in workdir.iterdir()),
    }
    return [name for name, read in parts.items() if not same(read(ours), read(theirs))]


def same(ours, theirs) -> bool:
    """Whether two trees are equal bit by bit."""
    if jax.tree.structure(ours) != jax.tree.structure(theirs):
        return False
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in map(_arrays, pairs))


def _arrays(pair: tuple) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(pair[0]), np.asarray(pair[1])


def table(kills: list[Kill]) -> str:
    """Return the kills as lines of Markdown."""
    head = "| kill | while | place | signal | worked, s | exit code | ended after, s |"
    rows = [
        f"| {i} | {k.stage} | {k.place[1]} | {k.signal} | {k.worked:.1f} | {k.code} | {k.seconds} |"
        for i, k in enumerate(kills, start=1)
    ]
    return "\n".join([head, "|---|---|---|---|---|---|---|", *rows])


def source() -> dict:
    """Return what the result came from."""
    return {
        **origin(),
        "device": f"{processor()}, {len(os.sched_getaffinity(0))} core(s)",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }


def main(_) -> None:
    """Do both runs, compare them, say and write what came out."""
    options, started = flags.FLAGS, time.perf_counter()
    workdir, fields = Path(options.workdir).absolute(), BUDGET + options.field
    shutil.rmtree(workdir, ignore_errors=True)
    workdir.mkdir(parents=True)
    prepare_console()
    uninterrupted(workdir / "uninterrupted", fields)
    seen = uninterrupted(workdir / "again", fields)
    kills = []
    for moment in draw_moments(seen, options.kills, options.seed):
        kills.append(killed(workdir / "killed", fields, moment))
        print(table(kills).splitlines()[-1], flush=True)
    last = Process(workdir / "killed", fields)
    if last.end():
        sys.exit(last.said())
    same_again = not differences(workdir / "again", workdir / "uninterrupted")
    different = differences(workdir / "killed", workdir / "uninterrupted")
    result = {
        "different": different,
        "same_in_one_go_again": same_again,
        "num_killed": sum(kill.code != 0 for kill in kills),  # the others came after the end
        "kills_by_stage": Counter(kill.stage for kill in kills),
        "kills": [kill._asdict() for kill in kills],
        "uninterrupted_seconds_of_work": round(seen[-1][0], 1),
        "wall_seconds": round(time.perf_counter() - started, 1),
        "fields": fields,
        "seed": options.seed,
        **source(),
    }
    print(table(kills))
    print(f"different from the run in one go: {', '.join(different) or 'nothing'}")
    print(f"killed {result['num_killed']} times; the run in one go equals itself: {same_again}")
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    # A run that does not equal itself, or was hardly ever killed, has shown nothing.
    shown = same_again and result["num_killed"] == options.kills
    sys.exit(0 if shown and not different else 1)


def define_flags() -> None:
    """Define what the command line can say."""
    out = "experiments/results/stress/stress.json"
    flags.DEFINE_integer("kills", 20, "How many times the run is killed.", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Of the moments and the signals.")
    flags.DEFINE_string("workdir", "results/stress", "Folder of the runs, made anew.")
    flags.DEFINE_string("out", out, "Where the result goes.")
    flags.DEFINE_multi_string("field", [], "Further fields, as harden.max_steps=12.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
