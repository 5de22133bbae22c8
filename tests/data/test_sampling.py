import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moth_jax.data.sampling import batch_for_classes, class_indices, epoch_batches, pair_batch
from moth_jax.errors import InputError

NUM_CLASSES = 5


def draw(labels, classes, *, per_class, batch_size, seed=0):
    indices = class_indices(labels, NUM_CLASSES)
    rng = np.random.default_rng([seed, 0])
    return pair_batch(indices, classes, per_class=per_class, batch_size=batch_size, rng=rng)


@given(st.lists(st.integers(0, NUM_CLASSES - 1), min_size=1, max_size=50))
@settings(max_examples=40, deadline=None)
def test_class_indices_hold_each_sample_once_under_its_class(labels):
    indices = class_indices(np.array(labels), NUM_CLASSES)
    assert len(indices) == NUM_CLASSES
    assert sorted(np.concatenate(indices)) == list(range(len(labels)))
    for k, members in enumerate(indices):
        assert all(labels[i] == k for i in members)
        assert (np.diff(members) > 0).all()


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_pair_batch_holds_the_pair_where_it_says_and_no_sample_twice(data):
    labels = np.array(data.draw(st.lists(st.integers(0, NUM_CLASSES - 1), min_size=1, max_size=60)))
    classes = data.draw(st.lists(st.integers(0, NUM_CLASSES - 1), max_size=3, unique=True))
    per_class = data.draw(st.integers(1, 8))
    smallest = max(1, len(classes) * per_class)
    assume(smallest <= len(labels))
    batch_size = data.draw(st.integers(smallest, len(labels)))
    seed = data.draw(st.integers(0, 1000))
    indices, weights = draw(labels, classes, per_class=per_class, batch_size=batch_size, seed=seed)

    assert indices.shape == (batch_size,)
    assert indices.dtype == np.int64
    assert len(set(indices)) == batch_size
    assert indices.min() >= 0
    assert indices.max() < len(labels)
    assert weights.shape == (len(classes), per_class)
    assert weights.dtype == np.float32
    slots = indices[: len(classes) * per_class].reshape(len(classes), per_class)
    for k, members, weight in zip(classes, slots, weights, strict=True):
        assert weight.sum() == min(per_class, (labels == k).sum())
        assert (labels[members[weight == 1]] == k).all()
    drawn_on_purpose = int(weights.sum())
    num_others = int((~np.isin(labels, classes)).sum())
    of_others = int((~np.isin(labels[indices], classes)).sum())
    assert of_others == min(num_others, batch_size - drawn_on_purpose)


def test_the_rest_of_a_batch_is_uniform_over_the_other_samples():
    labels = np.array([0] * 10 + [1] * 10 + [2] * 30 + [3] * 5 + [4] * 15)
    seen = np.zeros(len(labels))
    for seed in range(400):
        seen[draw(labels, [0, 1], per_class=2, batch_size=14, seed=seed).indices[4:]] += 1
    assert (seen[:20] == 0).all()
    assert seen[20:].min() > 45
    assert seen[20:].max() < 120


def test_the_generator_alone_decides_the_batch():
    labels = np.arange(60) % NUM_CLASSES
    same = [draw(labels, [1, 2], per_class=3, batch_size=20, seed=5).indices for _ in range(2)]
    assert (same[0] == same[1]).all()
    other = draw(labels, [1, 2], per_class=3, batch_size=20, seed=6).indices
    assert (same[0] != other).any()


@pytest.mark.parametrize(
    ("classes", "per_class", "batch_size", "message"),
    [
        ([0, 1], 8, 15, r"batch_size must be in \[16, 50\] for 2 classes of 8.*got 15"),
        ([0, 1], 8, 51, "out of 50, got 51"),
        ([], 8, 0, r"in \[1, 50\].*got 0"),
        ([0, 0], 2, 10, r"distinct and in \[0, 5\), got \[0, 0\]"),
        ([0, 5], 2, 10, r"got \[0, 5\]"),
        ([-1], 2, 10, r"got \[-1\]"),
        ([0, 1], 0, 10, "per_class must be at least 1, got 0"),
    ],
)
def test_impossible_batches_are_refused(classes, per_class, batch_size, message):
    with pytest.raises(InputError, match=message):
        draw(np.arange(50) % NUM_CLASSES, classes, per_class=per_class, batch_size=batch_size)


@given(st.integers(1, 40), st.integers(1, 40), st.booleans())
@settings(max_examples=40, deadline=None)
def test_an_epoch_visits_each_sample_at_most_once_in_batches_of_one_size(n, size, drop_last):
    assume(not drop_last or size <= n)
    batches = epoch_batches(n, size, np.random.default_rng(0), drop_last)
    visited = np.concatenate(batches)
    assert len(set(visited)) == len(visited)
    assert len(visited) == (n - n % size if drop_last else n)
    assert all(len(batch) == size for batch in batches[:-1])
    assert set(visited) <= set(range(n))


@pytest.mark.parametrize(
    ("n", "size", "drop_last"), [(10, 0, False), (10, 11, True), (0, 1, False)]
)
def test_an_epoch_without_a_batch_is_refused(n, size, drop_last):
    with pytest.raises(InputError, match=rf"batch_size must be in \[1, {n}\].*got {size}"):
        epoch_batches(n, size, np.random.default_rng(0), drop_last)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_half_of_a_batch_for_some_classes_is_theirs_and_the_rest_of_all_that_remain(data):
    labels = np.array(data.draw(st.lists(st.integers(0, NUM_CLASSES - 1), min_size=2, max_size=60)))
    classes = data.draw(st.sets(st.sampled_from(sorted(set(labels))), min_size=1))
    batch_size = data.draw(st.integers(1, len(labels)))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    members = class_indices(labels, NUM_CLASSES)
    indices = batch_for_classes(members, sorted(classes), batch_size=batch_size, rng=rng)
    assert len(set(indices)) == len(indices) == batch_size
    is_theirs = np.isin(labels, sorted(classes))
    assert is_theirs[indices].sum() >= min(batch_size // 2, is_theirs.sum())
    if batch_size == len(labels):
        assert sorted(indices) == list(range(len(labels)))


def test_the_other_half_is_drawn_from_all_samples_alike():
    labels = np.repeat([0, 1, 2], [40, 40, 20])
    members = class_indices(labels, 3)
    rng = np.random.default_rng(0)
    counts = np.zeros(3)
    for _ in range(300):
        indices = batch_for_classes(members, [0], batch_size=20, rng=rng)
        counts += np.bincount(labels[indices], minlength=3) / 300
    # 10 of class 0 on purpose; of the 90 that remain 10, in proportion.
    np.testing.assert_allclose(counts, [10 + 300 / 90, 400 / 90, 200 / 90], rtol=0.1)


def test_a_batch_for_all_classes_that_have_samples_is_a_random_batch():
    members = class_indices(np.array([0, 2] * 10), 3)
    one, other = (np.random.default_rng(3) for _ in range(2))
    batch = batch_for_classes(members, [2, 0], batch_size=7, rng=one)
    random = pair_batch(members, (), per_class=0, batch_size=7, rng=other).indices
    np.testing.assert_array_equal(batch, random)
