"""A tiny hardening by MOTH of the linear classifier, and what its compiled programs do in it."""

import contextlib
import dataclasses
import functools

import jax
import numpy as np
import pytest

from moth_jax.hardening import moth
from moth_jax.hardening.moth import MothConfig, harden
from tests.helpers.hardenings import Call
from tests.helpers.toys import (
    Rounds,
    StoppedError,
    assert_same_arrays,
    linear_classifier,
    row_dataset,
    row_variables,
)

K = 4
CLASSIFIER = linear_classifier(K)
VARIABLES = row_variables(K)
DATASET = row_dataset([12] * K)
CONFIG = MothConfig(
    max_steps=6,
    max_accuracy_drop=1.0,
    validate_every=3,
    batch_size=20,
    victims_per_class=4,
    first_steps=15,
    next_steps=6,
    warmup_steps=15,
    warmup_images_per_class=3,
    minibatch_size=8,
    patience=3,
    max_trigger_share=1.0,
    learning_rate=0.01,
)
# Fields that are read on the host only: runs that differ in them share their compiled programs.
HOST_FIELDS = {
    name: getattr(MothConfig(), name)
    for name in (
        *("epochs", "max_steps", "max_accuracy_drop", "validate_every", "steps_per_round"),
        *("pairs_per_step", "random_share", "scheduler", "dynamic", "trigger_memory_mb", "seed"),
        *("first_steps", "first_mask_weight", "next_steps", "next_mask_weight", "classes"),
        *("warmup_steps", "warmup_mask_weight", "warmup_max_images", "universal_too"),
    )
}
PROGRAMS = ("invert_towards", "invert_universal", "stamped_update", "step")
compile_once = functools.cache(moth._compile)


@contextlib.contextmanager
def recorded_programs():
    """Compile what is new only; yields {name: `Call`s} of the compiled programs."""
    calls = {name: [] for name in PROGRAMS}

    def recorded(name, program):
        def call(*args, **options):
            result = program(*args, **options)
            calls[name].append(Call(args, options, result))
            return result

        return call

    def compile_recorded(classifier, dataset, config):
        programs = compile_once(classifier, DATASET, dataclasses.replace(config, **HOST_FIELDS))
        return dataclasses.replace(
            programs, **{name: recorded(name, getattr(programs, name)) for name in PROGRAMS}
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moth, "_compile", compile_recorded)
        yield calls


def run(dataset=DATASET, variables=VARIABLES, state=None, stop_after=None, **options):
    """Harden; returns the final state (None if interrupted) and its rounds."""
    rounds = Rounds(stop_after)
    config = dataclasses.replace(CONFIG, **options)
    try:
        final = harden(
            CLASSIFIER, variables, dataset, config, state=state, on_round=rounds, progress=False
        )
    except StoppedError:
        final = None
    return final, rounds


def as_arrays(state):
    """All of a state as a tree of arrays, copied."""
    fields = {**vars(state), "bank": state.bank.arrays}
    return jax.tree.map(np.array, {k: v for k, v in fields.items() if v is not None})


def assert_same_state(one, other):
    assert_same_arrays(as_arrays(one), as_arrays(other))
