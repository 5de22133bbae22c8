import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moth_jax.errors import InputError
from moth_jax.evaluation import accuracy
from moth_jax.training import (
    Adversary,
    Place,
    TrainingConfig,
    TrainState,
    make_update,
    perturb,
    sgd,
    steps_per_epoch,
    train,
)
from tests.helpers.toys import RecordedProgress, linear_classifier, row_dataset, row_variables

CLASSIFIER = linear_classifier()
DATASET = row_dataset()


def zero_variables():
    return jax.tree.map(jnp.zeros_like, row_variables())


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def softmax_gradient(variables, images, labels):
    """The gradient of the mean cross-entropy of a linear model, by hand."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    logits = flat @ np.asarray(variables["params"]["kernel"], np.float64)
    logits += np.asarray(variables["params"]["bias"], np.float64)
    logits -= np.asarray(variables["batch_stats"]["mean"], np.float64)
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    error = exponentials / exponentials.sum(1, keepdims=True) - np.eye(3)[labels]
    return {"kernel": flat.T @ error / len(flat), "bias": error.mean(0)}


def test_the_optimiser_is_nesterov_momentum_with_an_l2_penalty_on_kernels_only():
    rng = np.random.default_rng(0)
    params = {"kernel": rng.standard_normal((4, 3)), "bias": rng.standard_normal(3)}
    tx = sgd(0.1, momentum=0.9, weight_decay=0.01)
    ours = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    opt_state = tx.init(ours)
    velocity = {name: np.zeros_like(value) for name, value in params.items()}
    for _ in range(4):
        gradient = {name: rng.standard_normal(value.shape) for name, value in params.items()}
        updates, opt_state = jax.jit(tx.update)(
            {name: jnp.asarray(value, jnp.float32) for name, value in gradient.items()},
            opt_state,
            ours,
        )
        ours = jax.tree.map(jnp.add, ours, updates)
        # Keras: velocity = momentum * velocity - rate * g; w += momentum * velocity - rate * g,
        # where a penalty of 0.01 * |w|^2 adds 0.02 * w to g.
        gradient["kernel"] = gradient["kernel"] + 0.02 * params["kernel"]
        for name, value in gradient.items():
            velocity[name] = 0.9 * velocity[name] - 0.1 * value
            params[name] = params[name] + 0.9 * velocity[name] - 0.1 * value
    for name, value in params.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-6)


def one_update(batch_norm):
    variables = row_variables(scale=1.0)
    variables["batch_stats"]["mean"] = jnp.array([0.5, -0.5, 0.25])
    tx = sgd(0.1, momentum=0.0, weight_decay=0.0)
    state = TrainState(variables, tx.init(variables["params"]))
    images, labels = DATASET.train.batch(np.arange(10)), DATASET.train.labels[:10]
    update = jax.jit(make_update(CLASSIFIER, tx, batch_norm=batch_norm))
    after, loss = update(state, images, labels)
    return variables, images, labels, after.variables, loss


def test_frozen_batch_norm_uses_the_running_statistics_and_leaves_them_untouched():
    before, images, labels, after, loss = one_update("frozen")
    assert_same(after["batch_stats"], before["batch_stats"])
    gradient = softmax_gradient(before, images, labels)
    for name, value in gradient.items():
        expected = np.asarray(before["params"][name]) - 0.1 * value
        np.testing.assert_allclose(after["params"][name], expected, rtol=1e-4, atol=1e-6)
    logits = np.asarray(CLASSIFIER.predict(before, images))
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(10), labels]
    assert float(loss) == pytest.approx(losses.mean(), rel=1e-5)


def test_updated_batch_norm_normalises_by_the_batch_and_moves_the_running_statistics():
    before, images, _, after, loss = one_update("update")
    raw = images.reshape(10, -1) @ np.asarray(before["params"]["kernel"])
    expected = 0.9 * np.asarray(before["batch_stats"]["mean"]) + 0.1 * raw.mean(0)
    np.testing.assert_allclose(after["batch_stats"]["mean"], expected, rtol=1e-5)
    _, _, _, frozen, frozen_loss = one_update("frozen")
    assert float(loss) != pytest.approx(float(frozen_loss), rel=1e-3)
    assert not np.allclose(after["params"]["kernel"], frozen["params"]["kernel"], rtol=1e-3)


def test_an_unknown_batch_norm_mode_lists_the_choices():
    with pytest.raises(InputError, match=r"unknown batch_norm mode 'train'.*frozen, update"):
        make_update(CLASSIFIER, sgd(0.1, momentum=0.9, weight_decay=0.0), batch_norm="train")


CONFIG = TrainingConfig(epochs=4, batch_size=12, learning_rate=0.5)


def trained(*, dataset=DATASET, variables=None, progress=False, hooks=None, **changes):
    """The variables of a training from zero by `CONFIG` with `changes`."""
    config = dataclasses.replace(CONFIG, **changes)
    start = zero_variables() if variables is None else variables
    return train(CLASSIFIER, start, dataset, config, progress=progress, **(hooks or {}))


def test_training_learns_the_rows_and_reports_what_it_did():
    progress, told = RecordedProgress(), []
    hooks = {"on_epoch": lambda epoch, state, figures: told.append((epoch, figures))}
    variables = trained(progress=progress, hooks=hooks)
    assert accuracy(CLASSIFIER.predict, variables, DATASET.test) == 1
    assert [epoch for epoch, _ in told] == [1, 2, 3, 4]
    assert progress.advanced == [1, 1, 1, 1]
    assert progress.figures == told[-1][1]
    assert told[-1][1]["validation_accuracy"] == 1
    assert told[-1][1]["loss"] < told[0][1]["loss"]


def test_a_training_of_a_single_step_takes_it():
    options = {"epochs": 1, "batch_size": len(DATASET.train)}
    assert steps_per_epoch(dataclasses.replace(CONFIG, **options), len(DATASET.train)) == 1
    assert np.abs(trained(**options)["params"]["kernel"]).max() > 0.01


def test_options_out_of_their_range_are_refused():
    with pytest.raises(InputError, match="learning_rate must be above 0, got -1"):
        TrainingConfig(learning_rate=-1)
    with pytest.raises(InputError, match=r"adversary.epsilon must be in \[0, 1\], got 8"):
        TrainingConfig(adversary=Adversary(epsilon=8))


def test_a_training_resumed_from_any_epoch_equals_an_uninterrupted_one():
    states = []
    whole = trained(
        epochs=3, hooks={"on_epoch": lambda epoch, state, figures: states.append((epoch, state))}
    )
    epoch, state = states[1]
    assert epoch == 2
    progress = RecordedProgress()
    resumed = trained(epochs=3, progress=progress, hooks={"start": Place(epoch, state)})
    assert progress.advanced == [1]
    assert_same(resumed, whole)


def test_a_training_resumed_within_an_epoch_equals_an_uninterrupted_one():
    places, told, told_again = [], [], []
    hooks = {
        "on_step": lambda *place: places.append(place),
        "on_epoch": lambda epoch, state, figures: told.append(figures),
    }
    whole = trained(epochs=2, hooks=hooks)
    per_epoch = steps_per_epoch(CONFIG, len(DATASET.train))
    assert per_epoch > 2
    # After an epoch's last step comes what is told of the epoch.
    assert [(epoch, len(losses)) for epoch, _, losses in places] == [
        (epoch, step) for epoch in range(2) for step in range(1, per_epoch)
    ]
    epoch, state, losses = places[per_epoch]
    assert (epoch, len(losses)) == (1, 2)
    hooks = {
        "start": Place(epoch, state, np.asarray(losses)),
        "on_epoch": lambda epoch, state, figures: told_again.append(figures),
    }
    assert_same(trained(epochs=2, hooks=hooks), whole)
    assert told_again == told[1:]


def test_training_with_frozen_batch_norm_leaves_the_running_statistics_untouched():
    def statistics(batch_norm):
        variables = trained(variables=row_variables(), epochs=1, batch_norm=batch_norm)
        return np.asarray(variables["batch_stats"]["mean"])

    assert (statistics("frozen") == 0).all()
    assert (statistics("update") != 0).all()


def test_training_touches_neither_validation_nor_test_images():
    other = row_dataset(validation=DATASET.test, test=DATASET.validation)
    assert_same(trained(dataset=other), trained())


def test_the_seed_decides_the_order_of_the_images():
    first = trained(epochs=1, seed=3)
    assert_same(trained(epochs=1, seed=3), first)
    other = trained(epochs=1, seed=4)
    assert not np.array_equal(other["params"]["kernel"], first["params"]["kernel"])


def test_without_an_adversary_a_batch_is_the_very_batch():
    images = DATASET.train.images
    same = perturb(CLASSIFIER, row_variables(), images, None, jax.random.key(0), Adversary())
    assert same is images


def test_adversarial_training_makes_the_model_more_robust():
    def largest_weight(adversary):
        variables = trained(epochs=3, adversary=adversary)
        return float(np.abs(variables["params"]["kernel"]).max())

    # Against an adversary that nearly closes the gap between the rows (0.6), weights pay less.
    strong = Adversary(epsilon=0.25, step_size=0.1, num_steps=4)
    assert largest_weight(strong) < 0.8 * largest_weight(Adversary())
