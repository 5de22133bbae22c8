"""A tiny hardening by every method, of a model of two stages, for the tests of all of them."""

import functools
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from moth_jax import training
from moth_jax.hardening import METHODS
from moth_jax.models import from_function
from moth_jax.training import Adversary
from tests.helpers.runs import compilations_on_disk
from tests.helpers.toys import Rounds, row_dataset

DATASET = row_dataset((20, 20, 20))
K = DATASET.num_classes
FEATURES = 6


def logits_fn(tree, images):
    """Two stages of 1x1 convolutions, 4x4 and 2x2 positions; a dense head that reads the second."""
    params = tree["params"]
    x = checkpoint_name(jax.nn.relu(images @ params["first"] + params["offset"]), "first")
    x = x.reshape(-1, 2, 2, 2, 2, FEATURES).mean((2, 4))
    x = checkpoint_name(jax.nn.relu(x @ params["second"]), "second")
    rows = images.mean(3).mean(2) @ params["rows"]
    return x.reshape(x.shape[0], -1) @ params["head"] + rows


def variables_of(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    rows = np.zeros((4, K), np.float32)
    rows[:K, :K] = 8 * np.eye(K)  # sees the class k where row k is bright
    return {
        "params": {
            "first": normal(1, FEATURES),
            "offset": normal(1, 1, 1, FEATURES),
            "second": normal(FEATURES, FEATURES),
            "head": 0.1 * normal(4 * FEATURES, K),
            "rows": jnp.asarray(rows),
        }
    }


CLASSIFIER, VARIABLES = from_function(logits_fn, variables_of(), image_shape=(4, 4, 1))
COMMON = {
    "max_steps": 4,
    "validate_every": 2,
    "batch_size": 24,
    "max_accuracy_drop": 1.0,
    "learning_rate": 0.05,
}
MOTH = {"victims_per_class": 6, "first_steps": 6, "next_steps": 3, "patience": 3}
OPTIONS = {
    "moth": {**MOTH, "warmup_steps": 6, "warmup_images_per_class": 4},
    "pairwise": MOTH,
    "universal": {"num_images": 8, "first_steps": 60, "next_steps": 20, "patience": 3},
    "uap": {},
    "nc": {"num_images": 8, "inversion_steps": 60, "patience": 3},
    "nad": {"teacher_epochs": 1.0, "high_epochs": 0.5},
    "adversarial": {"adversary": Adversary(0.1, 0.05, 2)},
    "fine_tuning": {},
    "fine_pruning": {"max_prune_drop": 0.5},
}
# Options with which a method stamps no image, of those that stamp any.
UNSTAMPED = {
    **{name: {"max_trigger_share": 0.0} for name in ("moth", "pairwise", "universal")},
    "nc": {"stamp_share": 1e-9},
}


def config_of(name, **options):
    return METHODS[name].config(**{**COMMON, **OPTIONS[name], **options})


def run(name, *, state=None, stop_after=None, dataset=DATASET, variables=VARIABLES, **options):
    rounds = Rounds(stop_after)
    # Every run traces its own functions, but most of them are programs that are already there.
    with compilations_on_disk():
        final = METHODS[name].harden(
            CLASSIFIER,
            variables,
            dataset,
            config_of(name, **options),
            state=state,
            on_round=rounds,
            progress=False,
        )
    return final, rounds


@functools.cache
def whole(name):
    return run(name)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


class Update(NamedTuple):
    """What a training step was given: the model before it, and the batch as it trains on it."""

    variables: dict
    images: np.ndarray
    labels: np.ndarray


def recorded_updates(monkeypatch):
    """A list of `Update`s, in order, of whatever method is run from now on."""
    updates = []

    def note(*given):
        updates.append(Update(*jax.tree.map(np.asarray, given)))

    def make(*arguments, **options):
        update = make_update(*arguments, **options)

        def call(state, images, labels, *more):
            jax.debug.callback(note, state.variables, images, labels)
            return update(state, images, labels, *more)

        return call

    make_update = training.make_update
    for name, module in list(sys.modules.items()):
        if name.startswith("moth_jax.") and getattr(module, "make_update", None) is make_update:
            monkeypatch.setattr(module, "make_update", make)
    return updates


class Call(NamedTuple):
    """A call of a compiled program."""

    args: tuple
    options: dict
    result: object


def recorded_calls(monkeypatch, module, maker):
    """A list of the `Call`s of the programs that `module.maker` makes from now on."""
    calls, make = [], getattr(module, maker)

    def make_recorded(*arguments, **options):
        program = make(*arguments, **options)

        def call(*args, **options):
            result = program(*args, **options)
            calls.append(Call(args, options, result))
            return result

        return call

    monkeypatch.setattr(module, maker, make_recorded)
    return calls
