"""Hardening some classes of a larger head among each other."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from moth_jax.data.dataset import ImageSplit
from moth_jax.errors import InputError
from moth_jax.hardening import moth
from moth_jax.hardening.moth import MothConfig, harden
from tests.helpers.toys import linear_classifier, row_dataset, row_variables

K = 4
CLASSIFIER = linear_classifier(K)
VARIABLES = row_variables(K)
DATASET = row_dataset([12] * K)
CLASSES = (3, 0, 2)
OTHER = 1
CONFIG = MothConfig(
    max_steps=6,
    max_accuracy_drop=1.0,
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
    scheduler="uniform",
    classes=CLASSES,
)


@functools.cache
def programs():
    """The compiled programs: the same for every choice of classes."""
    return moth._compile(CLASSIFIER, DATASET, CONFIG)


def run(dataset=DATASET, state=None, **options):
    """Harden; returns the final state, its rounds, and the calls (name, args, result)."""
    rounds, calls = [], []

    def recorded(name):
        def call(*args, **kwargs):
            result = getattr(compiled, name)(*args, **kwargs)
            calls.append((name, args, result))
            return result

        return call

    compiled = programs()
    names = ("invert_towards", "stamped_update", "step")
    wrapped = dataclasses.replace(compiled, **{name: recorded(name) for name in names})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moth, "_compile", lambda *_: wrapped)
        final = harden(
            CLASSIFIER,
            VARIABLES,
            dataset,
            dataclasses.replace(CONFIG, **options),
            state=state,
            on_round=lambda *given: rounds.append(given),
            progress=False,
        )
    return final, rounds, calls


@functools.cache
def subset_run():
    return run()


def calls_of(name):
    return [(args, result) for called, args, result in subset_run()[2] if called == name]


def as_arrays(state):
    fields = {**vars(state), "bank": state.bank.arrays}
    return jax.tree.map(np.array, fields)


def assert_same_state(one, other):
    jax.tree.map(np.testing.assert_array_equal, as_arrays(one), as_arrays(other))


def label_of(images):
    """The class of each image: its brightest row."""
    return np.asarray(images).mean((-2, -1)).argmax(-1)


def test_all_classes_in_the_order_of_their_labels_are_what_no_choice_means():
    assert_same_state(run(classes=())[0], run(classes=(0, 1, 2, 3))[0])


def test_arms_bank_and_records_are_over_the_chosen_classes_in_their_order():
    final, rounds, _ = subset_run()
    assert final.warmup_sizes.shape == final.warmup_prior.shape == (3, 3)
    assert final.scheduler.num_selected.shape == (3, 3)
    assert {k for d in final.bank.arrays["direction"].tolist() for k in d} == {-1, 0, 1, 2}
    warm_ups = [records[0] for _, records in rounds[:3]]
    assert [(r["phase"], r["step"]) for r in warm_ups] == [("warm-up", k) for k in range(3)]
    assert [r["target"] for r in warm_ups] == ["row3", "row0", "row2"]
    steps = [record for _, records in rounds[3:] for record in records]
    assert [record["step"] for record in steps] == list(range(6))
    for record in steps:
        (a, b), backwards = record["directions"]
        assert backwards == [b, a]
        assert a != b
        assert {a, b} < {"row3", "row0", "row2"}
        assert record["num_victims"] == [4, 4]


def test_the_selections_are_counted_at_the_positions_of_the_pairs():
    final, rounds, _ = subset_run()
    names = [f"row{k}" for k in CLASSES]
    counted = np.zeros((3, 3), int)
    for _, records in rounds[3:]:
        a, b = (names.index(name) for name in records[0]["directions"][0])
        counted[a, b] += 1
        counted[b, a] += 1
    np.testing.assert_array_equal(final.scheduler.num_selected, counted)


def test_the_warm_up_inverts_from_the_chosen_classes_to_the_label_of_the_target():
    for target, (args, _) in zip(CLASSES, calls_of("invert_towards"), strict=True):
        _, samples, given, _ = args
        victims = [k for k in CLASSES if k != target]
        assert given == target
        assert samples.victims.tolist() == victims
        assert label_of(samples.images).tolist() == [[victim] * 3 for victim in victims]


def test_the_warm_up_keeps_what_it_found_at_the_positions():
    final, rounds, _ = subset_run()
    state = rounds[2][0]
    for position, (_, result) in enumerate(calls_of("invert_towards")):
        victims = [k for k in range(3) if k != position]
        np.testing.assert_array_equal(state.warmup_sizes[victims, position], result.sizes)
        np.testing.assert_array_equal(
            state.bank.start(victims[0], position).mask, result.trigger.mask[0]
        )
    assert np.isinf(np.diag(final.warmup_sizes)).all()


def test_images_of_the_other_classes_are_trained_on_in_the_warm_up_without_a_trigger():
    seen = 0
    for target, (args, _) in zip(CLASSES, calls_of("stamped_update"), strict=True):
        _, images, labels, _, stamped, _ = args
        np.testing.assert_array_equal(label_of(images), labels)
        assert stamped.any()
        assert not stamped[np.isin(labels, [target, OTHER])].any()
        seen += (labels == OTHER).sum()
    assert seen > 3


def test_half_of_a_batch_of_the_warm_up_is_of_the_chosen_classes_where_they_are_few():
    few = row_dataset([200, 8, 200, 8])
    _, _, calls = run(few, classes=(1, 3), max_steps=1)
    batches = [args[2] for name, args, _ in calls if name == "stamped_update"]
    assert len(batches) == 2
    for labels in batches:
        assert len(labels) == CONFIG.batch_size
        assert np.isin(labels, (1, 3)).sum() >= CONFIG.batch_size // 2
    assert np.isin(batches, (0, 2)).any()


def test_a_step_gets_the_victims_and_targets_of_its_pair_by_label_and_images_of_all_classes():
    names = list(DATASET.class_names)
    records = [record for _, records in subset_run()[1][3:] for record in records]
    others = 0
    for record, (args, _) in zip(records, calls_of("step"), strict=True):
        _, batch, targets, *_ = args
        a, b = (names.index(name) for name in record["directions"][0])
        assert targets.tolist() == [b, a]
        assert batch.labels[:8].tolist() == [a] * 4 + [b] * 4
        assert batch.weights.all()
        np.testing.assert_array_equal(label_of(batch.images), batch.labels)
        others += (batch.labels == OTHER).sum()
    assert others > 10


@pytest.mark.parametrize("index", [0, 2, 3])
def test_a_hardening_among_some_classes_resumes_as_any_other(index):
    final, rounds, _ = subset_run()
    assert_same_state(run(state=rounds[index][0])[0], final)


def test_without_a_choice_the_classes_that_have_images_are_hardened():
    labels = DATASET.train.labels
    kept = np.flatnonzero(labels != OTHER)
    train = ImageSplit(DATASET.train.batch(kept), labels[kept])
    partial = dataclasses.replace(DATASET, train=train)
    with pytest.warns(UserWarning, match="no training images of 'row1'"):
        final, rounds, _ = run(partial, classes=())
    assert final.warmup_sizes.shape == (3, 3)
    assert [records[0]["target"] for _, records in rounds[:3]] == ["row0", "row2", "row3"]
    with pytest.raises(InputError, match="no training images of 'row1'"):
        run(partial, classes=(0, 1))


def test_the_learning_rate_falls_after_the_warm_up_of_the_chosen_classes():
    config = dataclasses.replace(
        CONFIG, schedule="cosine", max_steps=4, momentum=0.0, weight_decay=0.0
    )
    tx = moth.optimiser(config, DATASET)
    params = {"bias": np.zeros(1, np.float32)}
    opt_state = tx.init(params)
    rates = []
    for _ in range(5):
        update, opt_state = tx.update({"bias": np.ones(1, np.float32)}, opt_state, params)
        rates.append(-float(update["bias"][0]) / CONFIG.learning_rate)
    np.testing.assert_allclose(rates, [1, 1, 1, 1, (1 + np.sqrt(0.5)) / 2], atol=1e-5)


@pytest.mark.parametrize("classes", [(2,), (2, 2)])
def test_fewer_than_two_different_classes_are_refused(classes):
    with pytest.raises(InputError, match="at least 2 different classes, got 2"):
        MothConfig(classes=classes)


def test_a_list_of_classes_will_do():
    assert hash(MothConfig(classes=[0, 2])) == hash(MothConfig(classes=(0, np.int64(2))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": (0, 4)}, r"classes must be in 0\.\.3, got 4"),
        ({"pairs_per_step": 2}, r"pairs_per_step must be in 1\.\.1 for 3 classes, got 2"),
    ],
)
def test_a_choice_that_does_not_fit_the_data_is_refused_before_anything_is_computed(
    options, message
):
    config = dataclasses.replace(CONFIG, **options)
    with pytest.raises(InputError, match=message):
        harden(CLASSIFIER, VARIABLES, DATASET, config, progress=False)


def test_data_that_do_not_name_every_output_of_the_model_are_refused():
    names_of_three = row_dataset([12] * 3)
    with pytest.raises(InputError, match="model has 4 outputs, rows names 3 classes; every output"):
        run(names_of_three, classes=())


def test_a_state_of_another_choice_of_classes_is_refused():
    state = subset_run()[1][0][0]
    with pytest.raises(InputError, match="among 3 classes, the configuration has 2"):
        run(state=state, classes=(0, 1))
