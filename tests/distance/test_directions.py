import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moth_jax.distance.directions import choose_directions
from moth_jax.errors import InputError

CLASSES = (4, 0, 7, 2)
LABELS = st.lists(st.sampled_from(CLASSES), unique=True, max_size=4)


@settings(max_examples=100, deadline=None)
@given(LABELS, LABELS, st.floats(0, 1), st.integers(0, 9))
def test_directions_are_those_out_of_the_victims_and_into_the_targets_row_after_row(
    victims, targets, share, seed
):
    expected = [
        (a, b)
        for a in CLASSES
        if a in (victims or CLASSES)
        for b in CLASSES
        if b in (targets or CLASSES) and a != b
    ]
    if not expected:
        with pytest.raises(InputError, match="no direction between these"):
            choose_directions(CLASSES, victims=victims, targets=targets)
        return
    choice = choose_directions(CLASSES, victims=victims, targets=targets)
    assert choice.directions == expected
    assert choice.details["of"] == len(expected)
    assert choice.details.get("targets", []) == targets
    count = round(share * len(expected))
    some = choose_directions(
        CLASSES, victims=victims, targets=targets, num_directions=count, seed=seed
    )
    assert len(some.directions) == (count or len(expected))
    assert [d for d in expected if d in some.directions] == some.directions
    assert some.details["kind"] == ("sample" if count else "all")


def test_a_seed_draws_the_sample_that_version_0_1_0_drew():
    pairs = [(a, b) for a in range(10) for b in range(10) if a != b]
    for seed in (0, 7):
        drawn = np.random.default_rng(seed).choice(len(pairs), 12, replace=False)
        choice = choose_directions(range(10), num_directions=12, seed=seed)
        assert choice.directions == [pairs[i] for i in sorted(drawn)]


def test_every_direction_is_drawn_as_often():
    draws = [choose_directions(range(4), num_directions=3, seed=s).directions for s in range(800)]
    counts = {d: sum(d in draw for draw in draws) / 800 for d in choose_directions(range(4))[0]}
    assert len(counts) == 12
    assert all(share == pytest.approx(0.25, abs=0.07) for share in counts.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"victims": (4, 1)}, "victims must be among the chosen classes, got 1"),
        ({"targets": (9, 1)}, "targets must be among the chosen classes, got 1, 9"),
        ({"victims": (4,), "targets": (4,)}, "no direction between these victims and targets"),
        ({"num_directions": 13}, r"num_directions must be in 0\.\.12, got 13"),
        ({"num_directions": -1}, r"num_directions must be in 0\.\.12, got -1"),
        ({"targets": (0,), "num_directions": 4}, r"num_directions must be in 0\.\.3, got 4"),
    ],
)
def test_a_choice_that_cannot_be_is_a_clear_error(options, message):
    with pytest.raises(InputError, match=message):
        choose_directions(CLASSES, **options)
