"""Figure 6: the two directions of a pair along training, symmetric against one at a time.

    python experiments/paper/figure6_symmetric.py --scale=cpu --cifar10_dir=DIR --cifar10_model=FILE

One pair is hardened alone, of the scale's first model or of those that --problems names; on the way
the distances of both its directions are measured. One direction at a time, enlarging one may shrink
the other.
"""

import ml_collections
from absl import app
from comparison import natural
from lab import (
    Model,
    distances,
    distances_after,
    first_problems,
    harden,
    measured_as,
    scale,
    snapshots,
    start,
)
from tables import Column, Row, figures_folder, write

PAIRS = {"digits": ("4", "9"), "cifar10": ("cat", "dog"), "gtsrb": ("stop", "yield")}
POINTS = 5
CPU_STEPS = 60  # on one pair as many as 2,700 on all
KINDS = ("symmetric", "one at a time")
THERE, BACK = Column("there", "first direction"), Column("back", "second direction")


def of_the_pair(config: ml_collections.ConfigDict) -> None:
    """Measure and harden the pair alone."""
    config.classes = PAIRS[config.data.name]
    config.distance.victims, config.distance.num_directions = (), 0


def hardened_pair(given: Model, kind: str, seed: int) -> Model:
    """Return the model after hardening the pair alone."""
    steps = CPU_STEPS if scale().name == "cpu" else given.config.harden.max_steps

    def change(config: ml_collections.ConfigDict) -> None:
        of_the_pair(config)
        config.seed = seed
        config.harden.symmetric = kind == "symmetric"
        config.harden.max_steps = steps

    every = max(1, steps // POINTS)
    name = f"figure6-{kind.replace(' ', '_')}-{seed}"
    return harden(given, name, "moth", change=change, every=every)


def both(matrix) -> dict:
    """Return the distances there and back; None where no trigger was found."""
    return {"there": float(matrix.values[0, 1]), "back": float(matrix.values[1, 0])}


def points(given: Model, kind: str) -> dict[int, list[dict]]:
    """Return at each step along the training the distances there and back, of every seed."""
    before = both(distances(measured_as(given, "figure6-before", of_the_pair)))
    found = {0: [before]}
    for seed in range(scale().num_seeds):
        for spent, hardened in snapshots(hardened_pair(given, kind, seed)):
            found.setdefault(spent["step"], []).append(both(distances_after(hardened)))
    return found


def draw(curves: dict[str, dict[int, list[dict]]], pair: tuple[str, str], path) -> None:
    """Draw the curves side by side: the mean of the seeds, and from the least to the largest."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for ax, (kind, found) in zip(axes, curves.items(), strict=True):
        for name, (a, b) in (("there", pair), ("back", pair[::-1])):
            sizes = [[values[name] for values in seeds] for seeds in found.values()]
            (line,) = ax.plot([*found], [np.mean(s) for s in sizes], marker="o", label=f"{a} → {b}")
            low, high = [min(s) for s in sizes], [max(s) for s in sizes]
            ax.fill_between([*found], low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        ax.set_title(kind)
        ax.set_xlabel("hardening step")
    axes[0].set_ylim(bottom=0)  # shared, and not before both are drawn: it ends the autoscaling
    axes[0].set_ylabel("class distance (pixels)")
    axes[-1].legend(frameon=False)
    figure.savefig(path)


def main(argv) -> None:
    del argv
    start()
    rows = []
    for problem in first_problems():
        given = natural(problem)
        pair = PAIRS[given.config.data.name]
        curves = {kind: points(given, kind) for kind in KINDS}
        name = f"{problem}, {pair[0]} → {pair[1]}"
        for kind, found in curves.items():
            rows += [Row((name, kind, str(step)), values) for step, values in found.items()]
        draw(curves, pair, figures_folder("figure6_symmetric") / f"{scale().name}-{problem}.png")
    title = "Figure 6: both directions' distances along training"
    keys = ["model", "hardening", "step"]
    print(write("figure6_symmetric", title, keys, [THERE, BACK], rows).read_text())


if __name__ == "__main__":
    app.run(main)
