"""Table III: what each part of MOTH is good for.

    python experiments/paper/table3_ablation.py --scale=cpu --cifar10_dir=DIR --cifar10_model=FILE

MOTH, and MOTH without one of its parts, on ResNet20 and CIFAR-10 (or what --problems names) with
the same number of training steps. Distances are also measured on the way, which gives the time
until they have grown by a given share: half of what MOTH reaches in the end.
"""

import itertools

import numpy as np
from absl import app, flags
from comparison import hardened_by, natural
from lab import (
    Model,
    distances,
    distances_after,
    first_problems,
    hardening_cost,
    increase,
    quality,
    scale,
    snapshots,
    start,
)
from tables import ACCURACY, CPU_SECONDS, DISTANCE, FAILURES, INCREASE, SECONDS, Column, Row, write

from moth_jax.errors import require_choice

VARIANTS = {
    "MOTH": {},
    "w/o symmetric": {"symmetric": False},
    "w/o dynamic adjustment": {"dynamic": False},
    "w/o approx. warm-up": {"approximate_warmup": False},
    "w/o scheduler": {"scheduler": "uniform"},
}
CHOSEN = flags.DEFINE_list("variants", list(VARIANTS), "Only these, and MOTH itself.")
UNTIL = Column("until", "CPU seconds to half of MOTH's increase", "{:.0f}")


def _published(accuracy, minutes, distance, increase=None) -> dict:
    figures = {"accuracy": accuracy / 100, "distance": distance, "seconds": minutes * 60}
    return figures if increase is None else {**figures, "increase": increase / 100}


PUBLISHED = {
    "natural": {"accuracy": 0.9152, "distance": 53.49},
    "MOTH": _published(90.34, 29.68, 109.70, 108.62),
    "w/o symmetric": _published(90.69, 35.40, 94.16, 78.90),
    "w/o dynamic adjustment": _published(90.65, 44.72, 103.45, 95.59),
    "w/o approx. warm-up": _published(90.44, 52.00, 105.28, 99.53),
    "w/o scheduler": _published(88.78, 120.47, 111.09, 112.84),
}


def variants() -> list[str]:
    """Return MOTH, by which the others are measured, and those that are chosen."""
    for variant in CHOSEN.value:
        require_choice("variant", variant, VARIANTS)
    return [name for name, options in VARIANTS.items() if not options or name in CHOSEN.value]


def hardened_without(given: Model, variant: str, seed: int) -> Model:
    """Return the model hardened by a variant."""
    name = variant.replace("/", "").replace(" ", "_").replace(".", "")
    options = VARIANTS[variant]
    return hardened_by(given, "moth", seed, variant=name if options else "", options=options)


def curve(given: Model, hardened: Model, end: dict) -> list[tuple[float, float]]:
    """Return (CPU seconds, increase) along the training; `end` has the figures of its last step."""
    before = distances(given)
    points = [(0.0, 0.0)]
    for spent, model in snapshots(hardened):
        if spent["step"] < end["steps"]:
            grown = increase(before, distances_after(model))["increase"]
            points.append((spent["cpu_seconds"], grown))
    return [*points, (end["cpu_seconds"], end["increase"])]


def seconds_until(points: list[tuple[float, float]], wanted: float) -> float | None:
    """Return when a curve first passes a value, between its points on a straight line."""
    for (t0, y0), (t1, y1) in itertools.pairwise(points):
        if y1 >= wanted > y0:
            return float(np.interp(wanted, [y0, y1], [t0, t1]))
    return None


def main(argv) -> None:
    del argv
    start()
    rows, chosen = [], variants()
    for problem in first_problems():
        published = PUBLISHED if problem == "cifar10-resnet20" else {}
        given = natural(problem)
        before = distances(given)
        figures = {
            **quality(given),
            "distance": before.average(),
            "failures": before.num_failures(),
        }
        rows.append(Row((problem, "natural"), [figures], published.get("natural", {})))
        wanted = {}
        for variant in chosen:
            seeds = figures_of(given, variant, wanted)
            rows.append(Row((problem, variant), seeds, published.get(variant, {})))
            columns = [ACCURACY, DISTANCE, INCREASE, FAILURES, SECONDS, CPU_SECONDS, UNTIL]
            title = "Table III: parts of MOTH left out"
            print(write("table3_ablation", title, ["model", "variant"], columns, rows).read_text())


def figures_of(given: Model, variant: str, wanted: dict[int, float]) -> list[dict]:
    """Return the figures of every seed of a variant.

    `wanted` gets the increase of which the time is told, of each seed: half of the first variant's.
    """
    before, seeds = distances(given), []
    for seed in range(scale().num_seeds):
        hardened = hardened_without(given, variant, seed)
        figures = {
            **quality(hardened),
            **increase(before, distances_after(hardened)),
            **hardening_cost(hardened),
        }
        points = curve(given, hardened, figures)
        wanted.setdefault(seed, 0.5 * figures["increase"])
        figures |= {"curve": points, "until": seconds_until(points, wanted[seed])}
        seeds.append(figures)
    return seeds


if __name__ == "__main__":
    app.run(main)
