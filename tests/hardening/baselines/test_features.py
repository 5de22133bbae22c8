"""The methods that read feature maps: NAD and fine-pruning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moth_jax.hardening.base import optimiser
from moth_jax.hardening.baselines import fine_pruning, nad
from moth_jax.hardening.baselines.stages import draw
from tests.helpers.hardenings import (
    CLASSIFIER,
    DATASET,
    FEATURES,
    VARIABLES,
    K,
    config_of,
    equal,
    recorded_updates,
    run,
    variables_of,
)


def maps_of(variables, images):
    """The feature maps of both stages, in NumPy."""
    params = {name: np.asarray(value) for name, value in variables["params"].items()}
    first = np.maximum(images @ params["first"] + params["offset"], 0)
    pooled = first.reshape(-1, 2, 2, 2, 2, FEATURES).mean((2, 4))
    return first, np.maximum(pooled @ params["second"], 0)


def test_attention_is_the_share_of_the_squares_over_channels():
    features = np.random.default_rng(0).normal(size=(3, 2, 2, 5)).astype(np.float32)
    squares = (features**2).sum(3).reshape(3, 4)
    expected = squares / np.sqrt((squares**2).sum(1, keepdims=True))
    np.testing.assert_allclose(nad.attention(jnp.asarray(features)), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("betas", "of_stages"),
    [((20.0, 300.0), (20.0, 300.0)), ((50.0,), (0.0, 50.0)), ((70.0, 20.0, 300.0), (20.0, 300.0))],
)
def test_the_loss_of_nad_has_each_of_the_last_stages_attention_by_its_beta(betas, of_stages):
    config = config_of("nad", augment=False, betas=betas)
    tx = optimiser(config, DATASET)
    batch = draw(DATASET, config, 0)
    teacher = {**VARIABLES, "params": variables_of(3)["params"]}
    train = nad.TrainState(VARIABLES, tx.init(VARIABLES["params"]))
    distil = nad._make_distillation(CLASSIFIER, VARIABLES, DATASET, config, tx)
    _, found = distil(train, teacher, batch)
    logits = CLASSIFIER.predict(VARIABLES, batch.images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    expected = float(losses.mean())
    for beta, mine, taught in zip(
        of_stages, maps_of(VARIABLES, batch.images), maps_of(teacher, batch.images), strict=True
    ):
        apart = nad.attention(jnp.asarray(mine)) - nad.attention(jnp.asarray(taught))
        expected += beta * float(jnp.square(apart).mean())
    assert expected > float(losses.mean()) + 0.1
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_the_student_of_nad_starts_from_the_given_model(monkeypatch):
    updates = recorded_updates(monkeypatch)
    _, rounds = run("nad")
    jax.effects_barrier()
    names = [record["phase"] for record in rounds.records]
    begun = rounds[names.index("hardening") - 1][0]
    moved = begun.train.variables["params"]["head"] - VARIABLES["params"]["head"]
    assert float(jnp.abs(moved).max()) > 0  # the teacher's
    assert names.count("preparation") == 2  # of 60 images in batches of 24
    after = rounds[-1][0].memory
    taught = {f"params:{name}": value for name, value in begun.train.variables["params"].items()}
    equal({name: after[name] for name in taught}, taught)
    equal(updates[2].variables, VARIABLES)


def test_fine_pruning_cuts_what_clean_images_leave_idle_and_it_stays_cut_while_the_rest_trains():
    # Channel 2 is never active, whatever its weights in the head say.
    second = VARIABLES["params"]["second"].at[:, 2].set(-100.0)
    idle = {**VARIABLES, "params": {**VARIABLES["params"], "second": second}}
    config = config_of("fine_pruning", max_prune_drop=0.0)
    cut = fine_pruning.channels_to_cut(CLASSIFIER, idle, DATASET, config)
    assert cut[2]
    assert not cut.all()
    final, rounds = run("fine_pruning", variables=idle)
    assert rounds.records[0]["num_channels"] == FEATURES
    before, head = (
        np.asarray(v["params"]["head"]).reshape(4, FEATURES, K) for v in (idle, final.kept)
    )
    assert not head[:, 2].any()
    kept = head.any((0, 2))
    assert kept.sum() == FEATURES - rounds.records[0]["num_cut"]
    assert (before != head)[:, kept].any((0, 2)).all()
    assert np.any(final.kept["params"]["rows"] != VARIABLES["params"]["rows"])


def fitted():
    """A model whose second stage alone decides, by the least squares of its head."""
    params = variables_of(1)["params"]
    params = {**params, "second": jnp.abs(params["second"]), "rows": 0 * params["rows"]}
    _, maps = maps_of({"params": params}, DATASET.train.batch(np.arange(60)))
    maps = maps.reshape(60, -1).astype(np.float64)
    wanted = np.eye(K)[DATASET.train.labels] - 1 / K
    head = np.linalg.solve(maps.T @ maps + 0.1 * np.eye(maps.shape[1]), maps.T @ wanted)
    return {**VARIABLES, "params": {**params, "head": jnp.asarray(head, jnp.float32)}}


@pytest.mark.parametrize(("drop", "count"), [(0.0, 1), (0.06, 4), (1.0, FEATURES - 1)])
def test_the_least_active_channels_are_cut_until_the_next_would_break_the_bound(drop, count):
    variables = fitted()
    config = config_of("fine_pruning", max_prune_drop=drop)
    cut = fine_pruning.channels_to_cut(CLASSIFIER, variables, DATASET, config)
    _, active = maps_of(variables, DATASET.train.batch(np.arange(60)))
    order = active.mean((0, 1, 2)).argsort()
    assert np.flatnonzero(cut).tolist() == sorted(order[:count])
    _, maps = maps_of(variables, DATASET.validation.batch(np.arange(len(DATASET.validation))))

    def accuracy(num_cut):
        keep = ~np.isin(np.arange(FEATURES), order[:num_cut])
        logits = (maps * keep).reshape(len(maps), -1) @ np.asarray(variables["params"]["head"])
        return np.mean(logits.argmax(1) == DATASET.validation.labels)

    lowest = accuracy(0) - drop - 1e-9
    assert all(accuracy(num_cut) >= lowest for num_cut in range(count + 1))
    assert count == FEATURES - 1 or accuracy(count + 1) < lowest


def test_channels_that_bypass_the_head_are_cut_by_the_weights_that_read_them():
    cut = np.array([True, False, True, False, False, False])
    keep = fine_pruning.weights_to_keep(CLASSIFIER, VARIABLES, DATASET, cut)
    assert set(keep) == {"head"}
    expected = np.repeat(np.tile(~cut, 4)[:, None], K, 1)
    np.testing.assert_array_equal(np.asarray(keep["head"]) != 0, expected)


def test_the_learning_rate_of_nad_falls_to_a_tenth(monkeypatch):
    schedules = []

    def sgd(schedule, **options):
        schedules.append(schedule)
        return make(schedule, **options)

    make = nad.sgd
    monkeypatch.setattr(nad, "sgd", sgd)
    run("nad", high_epochs=1.0, max_steps=1)
    (schedule,) = schedules
    rates = [float(schedule(step)) for step in range(5)]  # two steps are an epoch
    np.testing.assert_allclose(rates, [0.05, 0.05, 0.005, 0.005, 0.005], rtol=1e-6)
