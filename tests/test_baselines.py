"""The methods MOTH is compared with: what all of them keep, and what each of them does."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from runs import compilations_on_disk
from toys import Rounds, StoppedError, row_dataset

from moth_jax import checkpoints
from moth_jax.addon import optimiser
from moth_jax.baselines import adversarial, fine_pruning, fine_tuning, nad, nc, uap, universal
from moth_jax.baselines.base import draw, make_plain_update
from moth_jax.errors import InputError
from moth_jax.evaluation import accuracy
from moth_jax.methods import METHODS
from moth_jax.models import from_function
from moth_jax.moth import MothConfig
from moth_jax.scheduler import sweep_pair
from moth_jax.training import NO_ADVERSARY, Adversary

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
    "universal": {"num_images": 8, "first_steps": 6, "next_steps": 3, "patience": 3},
    "uap": {},
    "nc": {"num_images": 8, "inversion_steps": 60, "patience": 3},
    "nad": {"teacher_epochs": 1.0, "high_epochs": 0.5},
    "adversarial": {"adversary": Adversary(0.1, 0.05, 2)},
    "fine_tuning": {},
    "fine_pruning": {"max_prune_drop": 0.5},
}


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Every run traces its own functions, but most of them are programs that are already there."""
    with compilations_on_disk():
        yield


def config_of(name, **options):
    return METHODS[name].config(**{**COMMON, **OPTIONS[name], **options})


def run(name, *, state=None, stop_after=None, dataset=DATASET, variables=VARIABLES, **options):
    rounds = Rounds(stop_after)
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
        saved.save(1, *checkpoints.state_arrays(state))
        arrays, metadata = saved.latest()
        tx = method.tx(config, DATASET)
        resumed = checkpoints.state_from_arrays(method.state, arrays, metadata, tx)
        again, rest = run(name, state=resumed)
        equal(again.kept, final.kept)
        assert rest.records == rounds.records[len(rounds.records) - len(rest.records) :]


@pytest.mark.parametrize("name", slow_but("fine_tuning", "nc"))
def test_every_method_returns_the_last_state_within_the_accuracy_bound(name):
    final, _ = run(name, max_accuracy_drop=0.0, learning_rate=1e4, validate_every=1)
    assert final.stopped == "accuracy"
    assert final.kept_step == 0
    assert final.accuracy < final.initial_accuracy


@pytest.mark.parametrize("name", METHODS)
def test_every_method_refuses_a_batch_larger_than_the_data(name):
    with pytest.raises(InputError, match=r"batch_size 61 is larger than the data: 60"):
        run(name, batch_size=61)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_refuses_data_of_other_classes(name):
    with pytest.raises(InputError, match="3 outputs, rows names 4 classes"):
        run(name, dataset=row_dataset((20, 20, 20, 20)))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_refuses_a_class_without_clean_images(name):
    labels = DATASET.train.labels
    without = dataclasses.replace(DATASET, train=DATASET.train.subset(np.flatnonzero(labels != 1)))
    with pytest.raises(InputError, match="no training images of 'row1'"):
        run(name, dataset=without, classes=(0, 1), batch_size=24)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_warns_of_classes_without_clean_images_where_none_are_named(name):
    kept = np.flatnonzero(DATASET.train.labels != 1)
    without = dataclasses.replace(DATASET, train=DATASET.train.subset(kept))
    with (
        pytest.warns(UserWarning, match="no training images of 'row1': they are not hardened"),
        pytest.raises(InputError, match="batch_size 61"),  # which comes next
    ):
        run(name, dataset=without, batch_size=61)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match="batch_size 61"):
            run(name, dataset=without, classes=(0, 2), batch_size=61)


def test_a_pass_over_the_data_has_every_image_once_and_the_next_one_another_order():
    config = config_of("fine_tuning", batch_size=20)
    batches = [draw(DATASET, config, index) for index in range(6)]
    first = np.concatenate([batch.images for batch in batches[:3]])
    second = np.concatenate([batch.images for batch in batches[3:]])
    assert len(np.unique(first.reshape(60, -1), axis=0)) == 60
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(draw(DATASET, config, 4).images, batches[4].images)


def test_pairwise_has_no_warm_up_and_takes_every_pair_once_before_any_twice():
    _, rounds = run("pairwise", steps_per_round=1, max_steps=6)
    assert {record["phase"] for record in rounds.records} == {"hardening"}
    pairs = [frozenset(record["directions"][0]) for record in rounds.records]
    assert len(set(pairs[:3])) == len(set(pairs[3:])) == 3
    turns = [sweep_pair(5, turn, seed=1) for turn in range(20)]
    assert (
        sorted(turns[:10])
        == sorted(turns[10:])
        == [(a, b) for a in range(5) for b in range(a + 1, 5)]
    )
    assert turns[:10] != turns[10:]


def test_pairwise_takes_one_pair_at_a_time():
    with pytest.raises(InputError, match="one pair at a time"):
        MothConfig(scheduler="sweep", pairs_per_step=2)


def test_universal_takes_every_target_in_turn_and_goes_on_from_its_triggers():
    final, rounds = run("universal", steps_per_round=2, max_steps=6)
    targets = [record["target"] for record in rounds.records]
    assert targets[::2] == targets[1::2]
    assert set(targets) == set(DATASET.class_names)
    assert final.memory["mask"].shape == (K, 4, 4, 1)
    before, after = (rounds[i][0].memory["mask"] for i in (0, 1))
    position = DATASET.class_names.index(targets[0])
    others = [k for k in range(K) if k != position]
    np.testing.assert_array_equal(before[np.array(others)], after[np.array(others)])


def test_the_universal_perturbation_raises_the_loss_and_stays_in_its_bound():
    config = uap.UapConfig(epsilon=0.1, step_size=0.04, ascent_steps=5)
    images, labels = DATASET.train.batch(np.arange(30)), DATASET.train.labels[:30]

    def loss(perturbation):
        logits = CLASSIFIER.predict(VARIABLES, jnp.clip(images + perturbation[None], 0, 1))
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
        return float(-picked.mean())

    start = jnp.zeros(DATASET.image_shape)
    found = uap.ascend(CLASSIFIER, VARIABLES, images, labels, start, config)
    assert float(jnp.abs(found).max()) == pytest.approx(0.1)
    assert loss(found) > loss(start) + 0.01
    final, _ = whole("uap")
    bound = config_of("uap").epsilon
    assert 0 < float(jnp.abs(final.memory["perturbation"]).max()) <= bound + 1e-7


def test_a_sample_past_the_loss_bound_moves_the_perturbation_no_more():
    config = uap.UapConfig(loss_bound=1e-6)
    images, labels = DATASET.train.batch(np.arange(30)), DATASET.train.labels[:30]
    start = jnp.zeros(DATASET.image_shape)
    found = uap.ascend(CLASSIFIER, VARIABLES, images, labels, start, config)
    np.testing.assert_array_equal(found, start)


def test_nc_inverts_a_trigger_for_every_class_and_stamps_its_share_of_the_others():
    final, rounds = run("nc", stamp_share=1.0, max_steps=8)
    prepared = [record for record in rounds.records if record["phase"] == "preparation"]
    assert [record["target"] for record in prepared] == list(DATASET.class_names)
    assert np.isfinite([record["size"] for record in prepared]).all()
    np.testing.assert_allclose(final.memory["size"], [r["size"] for r in prepared], rtol=1e-6)
    stamped = [r["num_stamped"] for r in rounds.records if r["phase"] == "hardening"]
    # With every sample stamped but those of the trigger's own class: two of three.
    assert 0.5 < np.mean(stamped) / 24 < 0.85


def test_attention_is_the_share_of_the_squares_over_channels():
    features = np.random.default_rng(0).normal(size=(3, 2, 2, 5)).astype(np.float32)
    squares = (features**2).sum(3).reshape(3, 4)
    expected = squares / np.sqrt((squares**2).sum(1, keepdims=True))
    np.testing.assert_allclose(nad.attention(jnp.asarray(features)), expected, rtol=1e-5)


def test_a_student_that_looks_where_its_teacher_looks_learns_by_cross_entropy_alone():
    config = config_of("nad", augment=False)
    tx = optimiser(config, DATASET)
    batch = draw(DATASET, config, 0)
    train = nad.TrainState(VARIABLES, tx.init(VARIABLES["params"]))
    distil = nad._make_distillation(CLASSIFIER, VARIABLES, DATASET, config, tx)
    _, same = distil(train, VARIABLES, batch)
    plain = make_plain_update(CLASSIFIER, DATASET, config, tx)
    _, expected = plain(train, batch)
    assert float(same) == pytest.approx(float(expected), rel=1e-5)
    other = {**VARIABLES, "params": {**variables_of(3)["params"]}}
    _, different = distil(train, other, batch)
    assert float(different) > float(expected) + 1


def test_the_student_of_nad_starts_from_the_given_model():
    _, rounds = whole("nad")
    names = [record["phase"] for record in rounds.records]
    begun = rounds[names.index("hardening") - 1][0]
    moved = begun.train.variables["params"]["head"] - VARIABLES["params"]["head"]
    assert float(jnp.abs(moved).max()) > 0  # the teacher's
    final, _ = run("nad", max_steps=1, learning_rate=1e-9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), final.kept, VARIABLES)


def test_fine_pruning_cuts_what_clean_images_leave_idle_and_it_stays_cut():
    # Channel 2 is never active, whatever its weights in the head say.
    second = VARIABLES["params"]["second"].at[:, 2].set(-100.0)
    idle = {**VARIABLES, "params": {**VARIABLES["params"], "second": second}}
    config = config_of("fine_pruning", max_prune_drop=0.0)
    cut = fine_pruning.channels_to_cut(CLASSIFIER, idle, DATASET, config)
    assert cut[2]
    assert not cut.all()
    final, rounds = run("fine_pruning", variables=idle)
    assert rounds.records[0]["num_channels"] == FEATURES
    head = np.asarray(final.kept["params"]["head"]).reshape(4, FEATURES, K)
    assert not head[:, 2].any()
    kept = [c for c in range(FEATURES) if head[:, c].any()]
    assert len(kept) == FEATURES - rounds.records[0]["num_cut"]
    np.testing.assert_array_equal(final.kept["params"]["rows"].shape, (4, K))
    assert np.any(final.kept["params"]["rows"] != VARIABLES["params"]["rows"])


def test_cutting_goes_on_until_the_accuracy_bound():
    none, most = (
        fine_pruning.channels_to_cut(
            CLASSIFIER, VARIABLES, DATASET, config_of("fine_pruning", max_prune_drop=drop)
        )
        for drop in (0.0, 1.0)
    )
    assert none.sum() <= most.sum() == FEATURES - 1


def test_channels_that_bypass_the_head_are_cut_by_the_weights_that_read_them():
    cut = np.array([True, False, True, False, False, False])
    keep = fine_pruning.weights_to_keep(CLASSIFIER, VARIABLES, DATASET, cut)
    assert set(keep) == {"head"}
    expected = np.repeat(np.tile(~cut, 4)[:, None], K, 1)
    np.testing.assert_array_equal(np.asarray(keep["head"]) != 0, expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: uap.UapConfig(epsilon=0.0), "epsilon must be above 0"),
        (lambda: uap.UapConfig(ascent_steps=0), "ascent_steps must be at least 1"),
        (lambda: nc.NcConfig(stamp_share=0.0), r"stamp_share must be in \(0, 1\]"),
        (lambda: nc.NcConfig(inversion_steps=0), "inversion_steps must be at least 1"),
        (lambda: nad.NadConfig(betas=()), "betas must be numbers"),
        (lambda: nad.NadConfig(teacher_epochs=0), "teacher_epochs must be above 0"),
        (lambda: universal.UniversalConfig(num_images=0), "num_images must be at least 1"),
        (lambda: fine_pruning.FinePruningConfig(max_prune_drop=2.0), r"share in \[0, 1\]"),
        (
            lambda: adversarial.AdversarialConfig(adversary=NO_ADVERSARY),
            "needs adversary.epsilon above 0",
        ),
        (lambda: fine_tuning.FineTuningConfig(classes=(1,)), "at least 2 different classes"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
