"""Universal adversarial training. What an adversary perturbs is in `test_baselines`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moth_jax.hardening.baselines import uap
from moth_jax.hardening.baselines.stages import draw
from tests.helpers.hardenings import (
    CLASSIFIER,
    DATASET,
    VARIABLES,
    config_of,
    recorded_updates,
    run,
    whole,
)


def loss(variables, images, labels):
    logits = jax.nn.log_softmax(CLASSIFIER.predict(variables, images))
    return float(-jnp.take_along_axis(logits, labels[:, None], 1).mean())


def test_the_universal_perturbation_raises_the_loss_and_stays_in_its_bound():
    config = uap.UapConfig(epsilon=0.1, step_size=0.04, ascent_steps=5)
    images, labels = DATASET.train.batch(np.arange(30)), DATASET.train.labels[:30]

    def perturbed(perturbation):
        return loss(VARIABLES, jnp.clip(images + perturbation[None], 0, 1), labels)

    start = jnp.zeros(DATASET.image_shape)
    found = uap.ascend(CLASSIFIER, VARIABLES, images, labels, start, config)
    assert float(jnp.abs(found).max()) == pytest.approx(0.1)
    assert perturbed(found) > perturbed(start) + 0.01
    final, _ = whole("uap")
    bound = config_of("uap").epsilon
    assert 0 < float(jnp.abs(final.memory["perturbation"]).max()) <= bound + 1e-7


def test_a_sample_past_the_loss_bound_moves_the_perturbation_no_more():
    config = uap.UapConfig(loss_bound=1e-6)
    images, labels = DATASET.train.batch(np.arange(30)), DATASET.train.labels[:30]
    start = jnp.zeros(DATASET.image_shape)
    found = uap.ascend(CLASSIFIER, VARIABLES, images, labels, start, config)
    np.testing.assert_array_equal(found, start)


def test_the_universal_perturbation_is_trained_on_and_goes_on_from_step_to_step(monkeypatch):
    updates = recorded_updates(monkeypatch)
    step_size, before = 0.02, np.zeros(DATASET.image_shape, np.float32)
    _, rounds = run("uap", epsilon=0.1, step_size=step_size)
    jax.effects_barrier()
    for index, ((state, _), update) in enumerate(zip(rounds, updates, strict=True)):
        perturbation = np.asarray(state.memory["perturbation"])
        batch = draw(DATASET, config_of("uap"), index)
        expected = np.clip(batch.images + perturbation[None], 0, 1)
        np.testing.assert_allclose(update.images, expected, atol=1e-6)
        np.testing.assert_array_equal(update.labels, batch.labels)
        # One step from the perturbation before, against the model before.
        moved = np.abs(perturbation - before)
        np.testing.assert_allclose(moved[moved > 0], step_size, rtol=1e-4)
        earlier = np.clip(batch.images + before[None], 0, 1)
        lower = loss(update.variables, earlier, batch.labels)
        assert loss(update.variables, update.images, batch.labels) > lower
        before = perturbation
    assert np.abs(before).max() > 1.5 * step_size
