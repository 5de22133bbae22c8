"""What hardening several disjoint pairs in a step does to the distances: 1, 2 and 4 on the digits.

    python experiments/studies/pairs_per_step.py

Each seed trains a small CNN, warms up once, and hardens with 1, 2 and 4 pairs a step from there.
Compared are the increase of the mean distance and the test accuracy after as many training steps,
and after as many processor seconds of the main training as one pair a step needs for them. The
distances are of 24 directions, the same for all models of a seed.
"""

import json
import time
from pathlib import Path

from absl import app, flags

from moth_jax.run.origin import origin

PAIRS = (1, 2, 4)  # of ten classes
SEEDS = flags.DEFINE_integer("seeds", 2, "Seeds.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 120, "Training steps.", lower_bound=30)
DIRECTIONS = flags.DEFINE_integer("directions", 24, "Measured directions.")
OUT = flags.DEFINE_string("out", "experiments/results/pairs_per_step", "Folder.")


def trained(dataset, seed: int):
    """Return a small CNN that was trained on the digits."""
    from moth_jax import models, training

    classifier, variables = models.create(
        "small_cnn",
        num_classes=10,
        image_shape=dataset.image_shape,
        mean=dataset.mean,
        std=dataset.std,
        seed=seed,
    )
    config = training.TrainingConfig(epochs=15, batch_size=64, learning_rate=0.05, seed=seed)
    return classifier, training.train(classifier, variables, dataset, config, progress=False)


def options(seed: int, pairs: int):
    """Return the options of configs/digits.py."""
    from moth_jax import MothConfig

    return MothConfig(
        max_steps=STEPS.value,
        warmup_steps=100,
        first_steps=60,
        next_steps=20,
        stamp_share=0.5,
        learning_rate=3e-3,
        batch_norm="frozen",
        max_accuracy_drop=1.0,
        pairs_per_step=pairs,
        seed=seed,
    )


class Hardening:
    """The states of a hardening after each round, and when they were there: after the first."""

    def __init__(self, classifier, dataset, config, state):
        from moth_jax import harden

        self.seconds, self.states, self._started = [], [], None
        harden(classifier, None, dataset, config, state=state, on_round=self._keep, progress=False)

    def _keep(self, state, records):
        del records
        now = time.process_time()
        # The first round compiles, and so the clock starts with its end.
        self._started = self._started or now
        self.seconds.append(now - self._started)
        self.states.append(state)

    def rounds_within(self, seconds: float) -> int:
        """Return the number of the last round that ended within so many seconds."""
        return sum(end <= seconds for end in self.seconds) - 1


def warmed_up(classifier, variables, dataset, config):
    """Return the state at the end of the warm-up, which is one for all numbers of pairs."""
    from moth_jax import harden

    class WarmedUpError(Exception):
        pass

    states = []

    def on_round(state, records):
        del records
        states.append(state)
        if state.warmed_up == 10:
            raise WarmedUpError

    try:
        harden(classifier, variables, dataset, config, on_round=on_round, progress=False)
    except WarmedUpError:
        return states[-1]


def rows_of(seed: int) -> list[dict]:
    """Return the figures of one seed."""
    import numpy as np

    from moth_jax import data, distance, evaluation
    from moth_jax.inversion import NeuralCleanse

    dataset = data.load("digits")
    classifier, variables = trained(dataset, seed)
    choice = distance.choose_directions(range(10), num_directions=DIRECTIONS.value, seed=seed)

    def measured(variables):
        split = dataset.test
        return distance.distance_matrix(
            classifier.predict,
            split.batch(np.arange(len(split))),
            split.labels,
            variables=variables,
            directions=choice,
            num_images=30,
            num_steps=150,
            directions_per_chunk=12,
            inversion=NeuralCleanse(),
            progress=False,
        )

    before = measured(variables)
    start = warmed_up(classifier, variables, dataset, options(seed, 1))
    rows, budget = [], None
    for pairs in PAIRS:
        hardening = Hardening(classifier, dataset, options(seed, pairs), start)
        budget = hardening.seconds[-1] if budget is None else budget
        ends = {"equal steps": len(hardening.states) - 1}
        if pairs > 1:
            ends["equal seconds"] = hardening.rounds_within(budget)
        for kind, number in ends.items():
            state = hardening.states[number]
            after = measured(state.train.variables)
            rows.append(
                {
                    "seed": seed,
                    "pairs": pairs,
                    "compared": kind,
                    "steps": state.step,
                    "cpu_seconds": hardening.seconds[number],
                    "increase": distance.relative_increase(before, after),
                    "failures": after.num_failures(),
                    "accuracy_before": evaluation.accuracy(
                        classifier.predict, variables, dataset.test
                    ),
                    "accuracy": evaluation.accuracy(
                        classifier.predict, state.train.variables, dataset.test
                    ),
                    "pairs_selected": int((np.triu(state.scheduler.num_selected, 1) > 0).sum()),
                }
            )
            print(rows[-1], flush=True)
    return rows


def main(argv):
    del argv
    import jax

    started = time.perf_counter()
    rows = [row for seed in range(SEEDS.value) for row in rows_of(seed)]
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    record = {
        **origin(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "seeds": list(range(SEEDS.value)),
        "wall_seconds": time.perf_counter() - started,
        "jax": jax.__version__,
        "rows": rows,
    }
    (out / "pairs_per_step.json").write_text(json.dumps(record, indent=2) + "\n")
    (out / "pairs_per_step.md").write_text(table(rows))
    print(table(rows))


def table(rows: list[dict]) -> str:
    """Return the means over the seeds as a table."""
    lines = [
        "| pairs a step | compared at | steps | CPU seconds | increase | test accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for kind in ("equal steps", "equal seconds"):
        for pairs in PAIRS:
            own = [
                row
                for row in rows
                if row["pairs"] == pairs and (row["compared"] == kind or pairs == 1)
            ]
            mean = {name: sum(row[name] for row in own) / len(own) for name in _MEANS}
            each = ", ".join(f"{100 * row['increase']:+.1f}" for row in own)
            lines.append(
                f"| {pairs} | {kind} | {mean['steps']:.0f} | {mean['cpu_seconds']:.1f} | "
                f"{100 * mean['increase']:+.1f} % ({each}) | "
                f"{100 * mean['accuracy_before']:.2f} -> {100 * mean['accuracy']:.2f} % |"
            )
    return "\n".join(lines) + "\n"


_MEANS = ("steps", "cpu_seconds", "increase", "accuracy_before", "accuracy")

if __name__ == "__main__":
    app.run(main)
