"""Every architecture against PyTorch, from random weights and batch-norm statistics."""

import copy
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moth_jax.distance.measure import class_distance
from moth_jax.hardening.step import StepBatch, StepConfig, make_harden_step
from moth_jax.inversion import Budget, NeuralCleanse, start_triggers
from moth_jax.models.weights import exporting, importing
from moth_jax.training import TrainState, sgd
from tests.helpers.structures import (
    CONVERT,
    STRUCTURES,
    Structure,
    build_random,
    gradient_difference,
    largest_difference,
    logits_difference,
    random_images,
)
from tests.helpers.torch_models import arrays, in_float64, to_torch, torch


def _rows(is_slow, hows=tuple(CONVERT)):
    return [
        pytest.param(row, id=row.name, marks=[pytest.mark.slow] if is_slow(row) else [])
        for row in STRUCTURES
        if row.how in hows
    ]


class Case(NamedTuple):
    structure: Structure
    module: torch.nn.Module


@pytest.fixture(scope="module", params=_rows(lambda row: row.slow))
def case(request):
    return Case(request.param, build_random(request.param))


@pytest.mark.parametrize("case", _rows(lambda row: row.slow, ["native"]), indirect=True)
def test_the_layout_is_recognised_by_names_and_shapes(case):
    layout = importing.LAYOUTS[case.structure.name]
    assert importing.identify(arrays(case.module)) == (
        case.structure.name,
        layout.mean,
        layout.std,
    )


def test_logits_equal_pytorchs(case):
    assert logits_difference(*case) < 1e-4


def test_input_gradients_equal_pytorchs_in_float64(case):
    assert gradient_difference(*case) < 1e-9


def test_a_training_pass_equals_pytorchs_in_logits_and_statistics(case):
    structure, module = case
    classifier, variables = CONVERT[structure.how](structure, module, structure.small)
    images = random_images(4, structure.small)
    module = copy.deepcopy(module).double().train()
    with torch.no_grad():
        theirs = module(to_torch(images, torch.float64, classifier.spec))
    with jax.enable_x64(True):
        ours, updated = jax.jit(classifier.forward_train)(
            in_float64(variables), jnp.asarray(images, jnp.float64)
        )
    assert largest_difference(ours, theirs) < 1e-8
    state = arrays(module)
    for name, moved in updated["batch_stats"].items():
        assert largest_difference(moved, in_pytorch(structure, name, state)) < 1e-8, name


def in_pytorch(structure, name, state):
    """One of our batch statistics, as PyTorch's state_dict has it."""
    if structure.how == "bridge":
        return state[name]
    for entry in importing.LAYOUTS[structure.name].entries:
        if (entry.kind, entry.ours) == ("batch_stats", name):
            return entry.to_ours(state[entry.theirs])
    raise KeyError(name)


def test_weights_go_home_and_load_strictly(case):
    structure, module = case
    classifier, variables = CONVERT[structure.how](structure, module, structure.small)
    exported = exporting.state_dict(classifier, variables)
    assert list(exported) == list(module.state_dict())
    assert all(array.flags.c_contiguous for array in exported.values())
    again = structure.module().eval()
    again.load_state_dict({k: torch.tensor(v) for k, v in exported.items()}, strict=True)
    x = to_torch(random_images(2, structure.small), torch.float32, classifier.spec)
    with torch.no_grad():
        assert torch.equal(again(x), module(x))


QUICK = ("lisa_cnn",)


# Compiled with all gradients, so most of them take long.
@pytest.mark.parametrize("case", _rows(lambda row: row.name not in QUICK), indirect=True)
def test_a_class_distance_is_measured_and_a_step_hardens(case):
    structure, module = case
    classifier, variables = CONVERT[structure.how](structure, module, structure.small)
    images, labels = random_images(6, structure.small), np.array([0, 0, 1, 1, 2, 2])
    inversion = NeuralCleanse(verify_every=2)
    found = class_distance(
        classifier.predict,
        images[:2],
        1,
        variables=variables,
        inversion=inversion,
        num_steps=4,
        mask_weight=1e-3,
    )
    assert found.trigger.mask.shape == (structure.small, structure.small, 1)
    assert found.success_rate in (0, 0.5, 1)
    tx, key = sgd(1e-3, momentum=0.9, weight_decay=0.0), jax.random.key(0)
    config = StepConfig(stamp_share=0.5, max_trigger_share=1.0)
    step = make_harden_step(classifier, inversion, tx, config)
    start = start_triggers(key, 2, classifier.spec.image_shape, inversion)
    state = TrainState(variables, tx.init(variables["params"]))
    batch, targets = StepBatch(images, labels, np.ones((2, 2), np.float32)), np.array([1, 0])
    after, info = step(state, batch, targets, start, key, budget=Budget(4, 1e-3, 2))
    assert np.isfinite(info.loss)
    for name, value in after.variables["params"].items():
        assert np.isfinite(value).all()
        if value.ndim > 1:  # what batch norm follows feels nothing of its bias
            assert not np.array_equal(value, variables["params"][name]), name
