"""Figure 6: the two directions of a pair along training, symmetric against one at a time.

    python experiments/figure6_symmetric.py --scale=cpu --cifar10_dir=DIR --cifar10_model=FILE

One pair is hardened alone; on the way the distances of both its directions are measured. One
direction at a time, enlarging one may shrink the other.
"""

from absl import app
from comparison import natural
from lab import Model, distances_after, harden, problems, scale, snapshots, start
from tables import Column, Row, figures_folder, write

from moth_jax import checkpoints

PAIRS = {"digits": ("4", "9"), "cifar10": ("cat", "dog"), "gtsrb": ("stop", "yield")}
POINTS = 5
CPU_STEPS = 60  # on one pair as many as 2,700 on all
KINDS = ("symmetric", "one at a time")
THERE, BACK = Column("there", "first direction"), Column("back", "second direction")


def hardened_pair(given: Model, kind: str) -> Model:
    """Return the model after hardening the pair alone."""

    steps = CPU_STEPS if scale().name == "cpu" else given.config.harden.max_steps

    def change(config) -> None:
        config.classes = PAIRS[config.data.name]
        config.harden.symmetric = kind == "symmetric"
        config.distance.victims, config.distance.num_directions = (), 0
        config.harden.max_steps = steps

    every = max(1, steps // POINTS)
    name = f"figure6-{kind.replace(' ', '_')}"
    return harden(given, name, "moth", change=change, every=every)


def both(matrix) -> dict:
    """Return the distances there and back; None where no trigger was found."""
    return {"there": float(matrix.values[0, 1]), "back": float(matrix.values[1, 0])}


def points(given: Model, kind: str) -> list[tuple[int, dict]]:
    """Return (step, distances there and back) along the training."""
    hardened = hardened_pair(given, kind)
    folder = given.folder / "figure6-before"
    checkpoints.save_model(folder / "hardened", given.classifier, given.variables)
    untouched = hardened._replace(variables=given.variables, folder=folder)
    found = [(0, both(distances_after(untouched)))]
    return found + [(spent["step"], both(distances_after(m))) for spent, m in snapshots(hardened)]


def draw(curves: dict[str, list[tuple[int, dict]]], pair: tuple[str, str], path) -> None:
    """Draw the curves side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for ax, (kind, found) in zip(axes, curves.items(), strict=True):
        steps = [step for step, _ in found]
        for name, (a, b) in (("there", pair), ("back", pair[::-1])):
            ax.plot(steps, [values[name] for _, values in found], marker="o", label=f"{a} → {b}")
        ax.set_title(kind)
        ax.set_xlabel("hardening step")
    axes[0].set_ylim(bottom=0)  # shared, and not before both are drawn: it ends the autoscaling
    axes[0].set_ylabel("class distance (pixels)")
    axes[-1].legend(frameon=False)
    figure.savefig(path)


def main(argv) -> None:
    del argv
    start()
    given = natural(problems()[0])
    pair = PAIRS[given.config.data.name]
    curves = {kind: points(given, kind) for kind in KINDS}
    rows = [
        Row((kind, str(step)), [values]) for kind, found in curves.items() for step, values in found
    ]
    title = f"Figure 6: {pair[0]} and {pair[1]}, both directions' distances along training"
    path = write("figure6_symmetric", title, ["hardening", "step"], [THERE, BACK], rows)
    draw(curves, pair, figures_folder("figure6_symmetric") / f"{scale().name}.png")
    print(path.read_text())


if __name__ == "__main__":
    app.run(main)
