"""Hardening some classes of a larger head among each other."""

import dataclasses
import functools

import numpy as np
import pytest

from moth_jax.data.dataset import ImageSplit
from moth_jax.errors import InputError
from moth_jax.hardening.moth import MothConfig
from tests.helpers.moths import CONFIG, DATASET, assert_same_state, recorded_programs, run
from tests.helpers.toys import row_dataset

CLASSES = (3, 0, 2)
OTHER = 1
SUBSET = {"classes": CLASSES, "scheduler": "uniform"}


def run_recorded(dataset=DATASET, **options):
    """The final state, the rounds, and the calls of the compiled programs."""
    with recorded_programs() as calls:
        return *run(dataset, **{**SUBSET, **options}), calls


@functools.cache
def subset_run():
    return run_recorded()


def calls_of(name):
    return subset_run()[2][name]


def label_of(images):
    """The class of each image: its brightest row."""
    return np.asarray(images).mean((-2, -1)).argmax(-1)


def test_all_classes_in_the_order_of_their_labels_are_what_no_choice_means():
    assert_same_state(run_recorded(classes=())[0], run_recorded(classes=(0, 1, 2, 3))[0])


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
    for target, (args, _, _) in zip(CLASSES, calls_of("invert_towards"), strict=True):
        _, samples, given, _ = args
        victims = [k for k in CLASSES if k != target]
        assert given == target
        assert samples.victims.tolist() == victims
        assert label_of(samples.images).tolist() == [[victim] * 3 for victim in victims]


def test_images_of_the_other_classes_are_trained_on_in_the_warm_up_without_a_trigger():
    seen = 0
    for target, (args, _, _) in zip(CLASSES, calls_of("stamped_update"), strict=True):
        _, images, labels, _, stamped, _ = args
        np.testing.assert_array_equal(label_of(images), labels)
        assert stamped.any()
        assert not stamped[np.isin(labels, [target, OTHER])].any()
        seen += (labels == OTHER).sum()
    assert seen > 3


def test_half_of_a_batch_of_the_warm_up_is_of_the_chosen_classes_where_they_are_few():
    few = row_dataset([200, 8, 200, 8])
    _, _, calls = run_recorded(few, classes=(1, 3), max_steps=1)
    batches = [args[2] for args, _, _ in calls["stamped_update"]]
    assert len(batches) == 2
    for labels in batches:
        assert len(labels) == CONFIG.batch_size
        assert np.isin(labels, (1, 3)).sum() >= CONFIG.batch_size // 2
    assert np.isin(batches, (0, 2)).any()


def test_a_step_gets_the_victims_and_targets_of_its_pair_by_label_and_images_of_all_classes():
    names = list(DATASET.class_names)
    records = [record for _, records in subset_run()[1][3:] for record in records]
    others = 0
    for record, (args, _, _) in zip(records, calls_of("step"), strict=True):
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
    assert_same_state(run_recorded(state=rounds[index][0])[0], final)


def test_without_a_choice_the_classes_that_have_images_are_hardened():
    labels = DATASET.train.labels
    kept = np.flatnonzero(labels != OTHER)
    train = ImageSplit(DATASET.train.batch(kept), labels[kept])
    partial = dataclasses.replace(DATASET, train=train)
    with pytest.warns(UserWarning, match="no training images of 'row1'"):
        final, rounds, _ = run_recorded(partial, classes=())
    assert final.warmup_sizes.shape == (3, 3)
    assert [records[0]["target"] for _, records in rounds[:3]] == ["row0", "row2", "row3"]


def test_a_list_of_classes_will_do():
    assert hash(MothConfig(classes=[0, 2])) == hash(MothConfig(classes=(0, np.int64(2))))


def test_a_state_of_another_choice_of_classes_is_refused():
    state = subset_run()[1][0][0]
    with pytest.raises(InputError, match="among 3 classes, the configuration has 2"):
        run_recorded(state=state, classes=(0, 1))
