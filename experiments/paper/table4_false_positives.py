"""Scanning (Section VI-A): do scanners take clean models for poisoned ones, and after hardening?

    python experiments/paper/table4_false_positives.py --scale=cpu --gtsrb_dir=DIR

Clean and poisoned models are trained here and scanned; then the clean ones are hardened by MOTH
and scanned again (`--problems=poisoned,clean,hardened`). Published, of the best scanner of a TrojAI
round: 32 clean models reported as poisoned, 6 of them after hardening.
"""

import ml_collections
import numpy as np
from absl import app
from lab import SEEDS, Model, harden, model, problems, quality, scale, start, success
from scales import PROBLEMS, SIGNS
from tables import ACCURACY, SUCCESS, Column, Row, write

from moth_jax.run.phases.scan import scan_model
from moth_jax.scanning import SCANNERS

PROBLEM = {"smoke": "digits-small_cnn", "cpu": "gtsrb-small_cnn", "full": "gtsrb-resnet20"}
TARGETS = {"digits": tuple("0123456789"), "gtsrb": SIGNS}  # of the backdoors, in turn
GROUPS = {"poisoned": "as trained", "clean": "as trained", "hardened": "hardened by MOTH"}
# At scale cpu, images of an arm: 132 pairs need fewer than 12 targets to cost as much.
NUM_IMAGES = {"neural_cleanse": 100, "pairs": 20, "k_arm": 50}
COUNT = Column("count", "reported as poisoned", "{:.0f}")
OF = Column("of", "of", "{:.0f}")
UNDECIDED = Column("undecided", "undecided", "{:.0f}")
STATISTIC = Column("statistic", "median statistic")
LOWEST, HIGHEST = Column("lowest", "lowest"), Column("highest", "highest")


def scanned(seed: int, *, poisoned: bool) -> Model:
    """Return one of the models: a seed of its own, and its own target if it is poisoned."""

    def change(config: ml_collections.ConfigDict) -> None:
        if scale().name == "cpu":
            config.training.epochs = 10
        if poisoned:
            classes = config.classes or TARGETS[config.data.name]
            config.backdoor.kind = "patch"
            config.backdoor.target = classes[seed % len(classes)]
            config.backdoor.seed = seed
            small = config.data.name == "digits"
            config.backdoor.size, config.backdoor.margin = (2, 0) if small else (3, 4)

    name = f"{PROBLEM[scale().name]}-scan-{'poisoned' if poisoned else 'clean'}-{seed}"
    return model(name, PROBLEMS[PROBLEM[scale().name]], seed, change=change)


def verdict(given: Model, method: str) -> dict:
    """Return what a scanner says of a model."""
    config = given.config.copy_and_resolve_references()
    config.scan.method = method
    if scale().name == "cpu":
        config.scan.num_images = NUM_IMAGES[method]
    folder = given.folder / f"scan-{method}"
    folder.mkdir(exist_ok=True)
    found = scan_model(given._replace(config=config, folder=folder).job(), given.saved)
    return {"poisoned": found.poisoned, "statistic": found.statistic}


def row(keys: tuple[str, ...], given: list[Model], method: str) -> Row:
    """Return how many of the models a scanner reports."""
    verdicts = [verdict(m, method) for m in given]
    statistics = [v["statistic"] for v in verdicts]
    figures = {
        "count": sum(v["poisoned"] is True for v in verdicts),
        "undecided": sum(v["poisoned"] is None for v in verdicts),
        "of": len(verdicts),
        "statistic": float(np.nanmedian(statistics)),
        "lowest": float(np.nanmin(statistics)),
        "highest": float(np.nanmax(statistics)),
        "accuracy": sum(quality(m)["accuracy"] for m in given) / len(given),
        "verdicts": verdicts,
    }
    if given[0].config.backdoor.kind:
        figures["attack_success"] = sum(success(m)["attack_success"] for m in given) / len(given)
    return Row((*keys, method), [figures])


def num_models() -> int:
    """Return how many models there are of a group, each with a seed of its own."""
    return SEEDS.value or scale().num_scanned


def models(group: str) -> list[Model]:
    """Return the models of a group."""
    given = [scanned(seed, poisoned=group == "poisoned") for seed in range(num_models())]
    return [harden(m, "moth", "moth") for m in given] if group == "hardened" else given


def main(argv) -> None:
    del argv
    start()
    rows = []
    for group in problems(tuple(GROUPS)):
        given = models(group)
        for method in SCANNERS:
            kind = "poisoned" if group == "poisoned" else "clean"
            rows.append(row((kind, GROUPS[group]), given, method))
            columns = [COUNT, UNDECIDED, OF, STATISTIC, LOWEST, HIGHEST, ACCURACY, SUCCESS]
            title = "Scanning: models reported as poisoned, before and after hardening"
            keys = ["models", "state", "scanner"]
            path = write(
                "table4_false_positives", title, keys, columns, rows, num_seeds=num_models()
            )
            print(path.read_text())


if __name__ == "__main__":
    app.run(main)
