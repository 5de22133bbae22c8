"""The methods MOTH is compared with: what all of them keep; files beside have each."""

import dataclasses
import warnings

import jax
import numpy as np
import pytest

from moth_jax.errors import InputError
from moth_jax.evaluation import accuracy
from moth_jax.hardening import METHODS
from moth_jax.hardening.baselines.stages import draw
from moth_jax.run import checkpoints
from moth_jax.training import NO_ADVERSARY, Adversary
from tests.helpers.hardenings import (
    CLASSIFIER,
    DATASET,
    OPTIONS,
    UNSTAMPED,
    VARIABLES,
    config_of,
    equal,
    recorded_updates,
    run,
    whole,
)
from tests.helpers.toys import StoppedError, row_dataset


def test_every_method_is_in_the_table():
    assert set(OPTIONS) == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_its_budget_and_says_how_it_went(name):
    final, rounds = whole(name)
    assert final.step == final.kept_step == 4
    assert final.stopped == "budget"
    assert final.initial_accuracy == accuracy(CLASSIFIER.predict, VARIABLES, DATASET.validation)
    assert final.accuracy == accuracy(CLASSIFIER.predict, final.kept, DATASET.validation)
    main = [record for record in rounds.records if record["phase"] == "hardening"]
    assert [record["step"] for record in main] == [0, 1, 2, 3]
    assert all(np.isfinite(record["loss"]) for record in main)
    assert main[-1]["validation_accuracy"] == final.accuracy
    changed = [
        name
        for name, value in final.kept["params"].items()
        if not np.array_equal(value, VARIABLES["params"][name])
    ]
    assert changed
    for phase, last in final.positions().items():
        steps = [record["step"] for record in rounds.records if record["phase"] == phase]
        assert steps == list(range(last + 1))


def slow_but(*quick):
    """All methods, those but `quick` marked slow: what is tested is much the same code."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in METHODS]


@pytest.mark.parametrize("name", slow_but("universal", "uap", "nc", "nad", "fine_pruning"))
def test_every_method_goes_on_from_a_saved_state_as_if_never_interrupted(name, tmp_path):
    final, rounds = whole(name)
    method = METHODS[name]
    config = config_of(name)
    for stop_after in (len(rounds) // 2, len(rounds) - 1):
        with pytest.raises(StoppedError):
            run(name, stop_after=stop_after)
        state = rounds[stop_after - 1][0]
        saved = checkpoints.RunCheckpoints(tmp_path / f"{stop_after}")
        saved.save(1, *state.to_arrays())
        arrays, metadata = saved.latest()
        tx = method.tx(config, DATASET)
        resumed = method.state.from_arrays(arrays, metadata, tx)
        again, rest = run(name, state=resumed)
        equal(again.kept, final.kept)
        assert rest.records == rounds.records[len(rounds.records) - len(rest.records) :]


def distances(updates):
    """How far each image is from the nearest training image of its label, plain and mirrored."""
    jax.effects_barrier()
    clean, labels = DATASET.train.batch(np.arange(60)), DATASET.train.labels
    images = np.concatenate([update.images for update in updates])
    same = np.concatenate([update.labels for update in updates])[:, None] == labels[None]
    sides = (clean, clean[:, :, ::-1])
    apart = [np.abs(images[:, None] - side[None]).max((2, 3, 4)) for side in sides]
    return tuple(np.where(same, values, np.inf).min(1) for values in apart)


QUICK = [name for name in METHODS if name != "moth"]  # pairwise takes the same steps


@pytest.mark.parametrize("name", [n for n in slow_but(*QUICK) if n != "adversarial"])
def test_every_method_trains_on_training_images_and_mirrored_ones_with_their_labels(
    name, monkeypatch
):
    updates = recorded_updates(monkeypatch)
    mirrored = dataclasses.replace(DATASET, flip=True)
    _, rounds = run(name, dataset=mirrored, **UNSTAMPED.get(name, {}))
    assert not any(np.any(record.get("num_stamped", 0)) for record in rounds.records)
    plain, flipped = distances(updates)
    assert len(updates) >= 4
    bound = config_of(name).epsilon + 1e-6 if name == "uap" else 0
    assert np.minimum(plain, flipped).max() <= bound
    assert 0.3 < np.mean(flipped < plain) < 0.7


@pytest.mark.parametrize("name", slow_but(*QUICK))
def test_with_an_adversary_every_method_trains_on_images_that_it_perturbed(name, monkeypatch):
    updates = recorded_updates(monkeypatch)
    adversary = Adversary(0.1, 0.05, 2)
    run(name, adversary=adversary, **UNSTAMPED.get(name, {}))
    apart, _ = distances(updates)
    assert len(updates) >= 4
    bound = adversary.epsilon + (config_of(name).epsilon if name == "uap" else 0)
    assert apart.max() <= bound + 1e-6
    assert np.quantile(apart, 0.1) > adversary.epsilon / 2  # and UAP's alone is 0.03


@pytest.mark.parametrize("name", slow_but("fine_tuning", "nc"))
def test_every_method_returns_the_last_state_within_the_accuracy_bound(name):
    rate = 1e3 if name == "moth" else 1e4  # with more its loss overflows first
    final, _ = run(name, max_accuracy_drop=0.0, learning_rate=rate, validate_every=1)
    assert final.stopped == "accuracy"
    assert final.kept_step == 0
    assert final.accuracy < final.initial_accuracy


WITHOUT_ROW1 = dataclasses.replace(
    DATASET, train=DATASET.train.subset(np.flatnonzero(DATASET.train.labels != 1))
)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 61}, r"batch_size 61 is larger than the data: 60"),
        ({"dataset": row_dataset([20] * 4)}, "3 outputs, rows names 4 classes; every output"),
        ({"dataset": WITHOUT_ROW1, "classes": (0, 1)}, "no training images of 'row1'"),
    ],
    ids=["batch", "classes of the model", "class without images"],
)
def test_every_method_refuses_data_that_do_not_fit(name, options, message):
    with pytest.raises(InputError, match=message):
        run(name, **options)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_warns_of_classes_without_clean_images_where_none_are_named(name):
    with (
        pytest.warns(UserWarning, match="no training images of 'row1': they are not hardened"),
        pytest.raises(InputError, match="batch_size 61"),  # which comes next
    ):
        run(name, dataset=WITHOUT_ROW1, batch_size=61)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match="batch_size 61"):
            run(name, dataset=WITHOUT_ROW1, classes=(0, 2), batch_size=61)


def test_a_pass_over_the_data_has_every_image_once_and_the_next_one_another_order():
    config = config_of("fine_tuning", batch_size=20)
    batches = [draw(DATASET, config, index) for index in range(6)]
    first = np.concatenate([batch.images for batch in batches[:3]])
    second = np.concatenate([batch.images for batch in batches[3:]])
    assert len(np.unique(first.reshape(60, -1), axis=0)) == 60
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(draw(DATASET, config, 4).images, batches[4].images)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("uap", {"epsilon": 0.0}, r"epsilon must be in \(0, 1\]"),
        ("uap", {"ascent_steps": 0}, "ascent_steps must be at least 1"),
        ("nc", {"stamp_share": 0.0}, r"stamp_share must be in \(0, 1\]"),
        ("nc", {"inversion_steps": 0}, "inversion_steps must be at least 1"),
        ("nad", {"betas": ()}, "betas must be numbers"),
        ("nad", {"teacher_epochs": 0}, "teacher_epochs must be above 0"),
        ("universal", {"num_images": 0}, "num_images must be at least 1"),
        ("fine_pruning", {"max_prune_drop": 2.0}, r"max_prune_drop must be in \[0, 1\]"),
        ("adversarial", {"adversary": NO_ADVERSARY}, "needs adversary.epsilon above 0"),
        ("fine_tuning", {"classes": (1,)}, "at least 2 different classes"),
    ],
)
def test_options_that_make_no_sense_are_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        METHODS[name].config(**options)
