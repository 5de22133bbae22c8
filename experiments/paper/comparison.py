"""The methods side by side on one model: what Tables I and II have in common."""

from collections.abc import Sequence

import ml_collections
from absl import flags
from lab import (
    Model,
    distances,
    distances_after,
    harden,
    hardening_cost,
    increase,
    model,
    quality,
    scale,
)
from scales import ADVERSARIAL, PROBLEMS
from tables import Row

from moth_jax.errors import require_choice
from moth_jax.run.configuration import set_adversary
from moth_jax.storage.files import read_json

METHODS = ("nc", "nad", "uap", "universal", "pairwise", "moth")
CLEAN_SHARE = {"nc": 0.1, "nad": 0.05}  # of the training images, as published: at scale full
NUM_SNAPSHOTS = 3  # of MOTH and its ablations, the last one at the end


def natural(problem: str, seed: int = 0) -> Model:
    """Return the naturally trained (or given) model of a problem."""
    return model(f"{problem}-natural-{seed}", PROBLEMS[problem], seed)


def adversarially_trained(problem: str, seed: int = 0) -> Model:
    """Return the model of PGD training: the natural one trained on, at full scale from scratch."""

    def change(config: ml_collections.ConfigDict) -> None:
        set_adversary(config, ADVERSARIAL[config.data.name])
        config.training.epochs = scale().adversarial_epochs
        if scale().name != "full":
            config.model.checkpoint = str(natural(problem, seed).folder / "original")
            config.model.name = "auto"
            config.model.fine_tune = True
            config.training.learning_rate = 0.02
        else:
            config.model.checkpoint = ""
            config.model.name = PROBLEMS[problem].arch  # that of a given model is read off it

    return model(f"{problem}-adversarial-{seed}", PROBLEMS[problem], seed, change=change)


def methods_flag() -> flags.FlagHolder[list[str]]:
    """Define --methods, of a script that compares them."""
    return flags.DEFINE_list("methods", list(METHODS), "Only these methods.")


def compare(
    problem: str, methods: Sequence[str], *, published: dict, adversarial: bool = False
) -> list[Row]:
    """Return the rows of a problem: the given model, then hardened by every method.

    The model is one; the seeds are of the hardening.

    Raises:
      InputError: one is asked for that the tables do not have.
    """
    for method in methods:
        require_choice("method", method, METHODS)
    given = (adversarially_trained if adversarial else natural)(problem)
    before = distances(given)
    training = read_json(given.folder / "original.json").get("training_seconds")
    figures = {
        **quality(given, robust=adversarial),
        "distance": before.average(),
        "failures": before.num_failures(),
        "seconds": training,
    }
    rows = [Row((problem, "none"), [figures], published.get((problem, "none"), {}))]
    for method in methods:
        figures = []
        for seed in range(scale().num_seeds):
            hardened = hardened_by(given, method, seed)
            figures.append(
                {
                    **quality(hardened, robust=adversarial),
                    **increase(before, distances_after(hardened)),
                    **hardening_cost(hardened),
                }
            )
        rows.append(Row((problem, method), figures, published.get((problem, method), {})))
    return rows


def hardened_by(
    given: Model, method: str, seed: int = 0, *, variant: str = "", options: dict | None = None
) -> Model:
    """Return the model hardened by a method: the same cell in every table that has it.

    Of MOTH, models on the way are kept: with `options` of its own, as a `variant`, too.
    """

    def change(config: ml_collections.ConfigDict) -> None:
        config.seed = seed
        config.harden.update(options or {})
        if scale().name == "full":
            config.clean_share = CLEAN_SHARE.get(method, 1.0)

    kept = method == "moth" and scale().name != "full"
    every = max(1, given.config.harden.max_steps // NUM_SNAPSHOTS) if kept else 0
    return harden(given, f"{variant or method}-{seed}", method, change=change, every=every)
