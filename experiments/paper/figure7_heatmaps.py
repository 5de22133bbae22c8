"""Figure 7: class distances of a model before and after each method, as heat maps.

    python experiments/paper/figure7_heatmaps.py --scale=cpu --cifar10_dir=DIR --cifar10_model=FILE

Of the models of Table I. At scale cpu that measures twelve directions; here it is all of them, on
fewer images, and the mean of these is another number than the table's.
"""

from absl import app
from comparison import hardened_by, natural
from lab import Model, distances, distances_after, measured_as, problems, scale, start
from tables import DISTANCE, FAILURES, INCREASE, Row, figures_folder, write

from moth_jax.distance.matrix import DistanceMatrix, relative_increase

METHODS = ("universal", "pairwise", "moth")
NUM_IMAGES = {"smoke": 5, "cpu": 20}  # of each class; at full those of the table


def draw(matrices: dict[str, DistanceMatrix], path) -> None:
    """Draw the matrices side by side on one scale."""
    import numpy as np
    from matplotlib.figure import Figure

    found = np.concatenate([m.values[np.isfinite(m.values)] for m in matrices.values()])
    figure = Figure(figsize=(3.6 * len(matrices), 3.9), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(matrices), squeeze=False)[0]
    for ax, (name, matrix) in zip(axes, matrices.items(), strict=True):
        shown = np.ma.masked_invalid(matrix.values)
        image = ax.imshow(shown, vmin=0, vmax=float(found.max()), cmap="viridis")
        ax.set_title(f"{name}: {matrix.average():.1f}")
        ax.set_xlabel("target")
        classes = range(len(matrix.class_names))
        ax.set_xticks(classes, matrix.class_names, rotation=90, fontsize=7)
        ax.set_yticks(classes, matrix.class_names, fontsize=7)
    axes[0].set_ylabel("victim")
    figure.colorbar(image, ax=axes, shrink=0.8, label="class distance (pixels)")
    figure.savefig(path)


def main(argv) -> None:
    del argv
    start()
    rows = []
    for problem in problems():
        given = natural(problem)
        before = distances(_of_all_directions(given))
        matrices = {"before": before}
        rows.append(Row((problem, "none"), [_figures(before)]))
        for method in METHODS:
            after = [
                distances_after(_of_all_directions(hardened_by(given, method, seed)))
                for seed in range(scale().num_seeds)
            ]
            matrices[method] = after[0]  # the picture is of one seed, the table of all
            figures = [
                {**_figures(matrix), "increase": relative_increase(before, matrix)}
                for matrix in after
            ]
            rows.append(Row((problem, method), figures))
        draw(matrices, figures_folder("figure7_heatmaps") / f"{scale().name}-{problem}.png")
    title = "Figure 7: class distances before and after"
    columns = [DISTANCE, INCREASE, FAILURES]
    keys = ["model", "method"]
    print(write("figure7_heatmaps", title, keys, columns, rows).read_text())


def _of_all_directions(given: Model) -> Model:
    """Return the model with its own folder for distances in every direction."""
    if scale().name not in NUM_IMAGES:
        return given

    def change(config) -> None:
        config.distance.num_directions = 0
        config.distance.num_images = NUM_IMAGES[scale().name]

    return measured_as(given, "figure7", change)


def _figures(matrix: DistanceMatrix) -> dict:
    return {"distance": matrix.average(), "failures": matrix.num_failures()}


if __name__ == "__main__":
    app.run(main)
