import dataclasses
import functools

import jax
import numpy as np
import pytest

from moth_jax.errors import InputError
from moth_jax.hardening import moth
from moth_jax.hardening.moth import MothConfig
from tests.helpers.toys import (
    RecordedProgress,
    Rounds,
    linear_classifier,
    row_dataset,
    row_variables,
)

K = 4
DATASET = row_dataset([12] * K)
CONFIG = MothConfig(
    max_steps=6,
    max_accuracy_drop=1.0,
    batch_size=20,
    victims_per_class=4,
    first_steps=10,
    next_steps=4,
    warmup_steps=10,
    warmup_images_per_class=3,
    minibatch_size=8,
    patience=3,
    max_trigger_share=1.0,
    learning_rate=0.01,
    closing_steps=5,
    closing_share=0.5,
)


def harden(classes=(), state=None, **options):
    """Harden; returns the rounds, and what the closing steps trained on."""
    given = []
    compile_programs = moth._compile

    def recorded(*arguments):
        programs = compile_programs(*arguments)

        def stamped_update(state, images, labels, trigger, stamped, key):
            given.append((labels, trigger, stamped))
            return programs.stamped_update(state, images, labels, trigger, stamped, key)

        return dataclasses.replace(programs, stamped_update=stamped_update)

    rounds = Rounds()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moth, "_compile", recorded)
        config = dataclasses.replace(CONFIG, classes=classes, **options)
        moth.harden(
            linear_classifier(K),
            row_variables(K),
            DATASET,
            config,
            state=state,
            on_round=rounds,
            progress=False,
        )
    return rounds, given[-config.closing_steps :]


whole = functools.cache(harden)


def of_rounds(rounds, num_classes=K):
    """Return the state after the last round, and after the last closing step."""
    return rounds[num_classes + 1][0], rounds[-1][0]


def hardened_directions(rounds):
    """Return {victim's name: names of the targets it had a round with}."""
    found = {}
    for record in rounds.steps:
        for victim, target in record.get("directions", ()):
            found.setdefault(victim, set()).add(target)
    return found


def test_the_closing_steps_come_after_the_rounds_and_change_nothing_in_them():
    rounds, _ = whole()
    steps = rounds.steps
    assert [record["step"] for record in steps] == list(range(11))
    assert ["directions" in record for record in steps] == [True] * 6 + [False] * 5
    assert [len(records) for _, records in rounds[K:]] == [3, 3, 3, 2]
    (after_rounds, final), (alone, _) = of_rounds(rounds), harden(closing_steps=0)
    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    same(after_rounds.train, alone[-1][0].train)
    assert alone[-1][0].stopped == final.stopped == "budget"
    assert (final.step, final.kept_step, after_rounds.stopped) == (11, 11, "")
    kernels = [s.train.variables["params"]["kernel"] for s in (after_rounds, final)]
    assert not np.array_equal(*kernels)


@pytest.mark.parametrize(
    ("classes", "options"),
    [((), {}), ((3, 0, 2), {}), ((), {"approximate_warmup": False})],
    ids=["all classes", "some", "every direction has a trigger of the warm-up"],
)
def test_a_stamped_sample_has_a_trigger_of_a_round_from_its_own_class(classes, options):
    rounds, closing = whole(classes, **options)
    positions = classes or tuple(range(K))
    bank = of_rounds(rounds, len(positions))[0].bank.copy()
    names, number = DATASET.class_names, DATASET.class_names.index
    hardened = hardened_directions(rounds)
    num_stamped = 0
    for labels, trigger, stamped in closing:
        assert not trigger.mask[~stamped].any()
        num_stamped += stamped.sum()
        for label, mask, pattern in zip(
            labels[stamped], trigger.mask[stamped], trigger.pattern[stamped], strict=True
        ):
            starts = [
                bank.start(positions.index(label), positions.index(number(target)))
                for target in hardened[names[label]]
            ]
            assert any(
                np.array_equal(mask, s.mask) and np.array_equal(pattern, s.pattern) for s in starts
            )
    assert num_stamped == sum(record["num_stamped"] for record in rounds.steps[6:])
    assert num_stamped > 10


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_share_is_of_the_samples_whose_class_has_been_in_a_round(share):
    rounds, closing = harden(closing_share=share, max_steps=3)
    hardened = [DATASET.class_names.index(name) for name in hardened_directions(rounds)]
    for labels, _, stamped in closing:
        expected = np.isin(labels, hardened) if share else np.zeros(len(labels), bool)
        np.testing.assert_array_equal(stamped, expected)
    assert len(hardened) < K  # else nothing was told apart


def test_all_triggers_of_a_class_have_their_turn():
    rounds, closing = harden(closing_share=1.0, closing_steps=20, max_steps=12)
    names = DATASET.class_names
    for name, targets in hardened_directions(rounds).items():
        seen = {
            pattern.tobytes()
            for labels, trigger, _ in closing
            for pattern in trigger.pattern[labels == names.index(name)]
        }
        assert len(seen) == len(targets)


def test_no_trigger_above_the_limit_is_stamped():
    rounds, _ = whole()
    state = of_rounds(rounds)[0]
    sizes = {
        (a, b): state.bank.size(a, b)
        for a, b in np.argwhere(state.scheduler.num_selected > 0).tolist()
    }
    limit = sorted(sizes.values())[len(sizes) // 2 - 1]
    small = {a for (a, _), size in sizes.items() if size <= limit}
    assert small != {a for a, _ in sizes}
    # What the rounds found is given, the limit is of the closing steps alone.
    share = limit / np.prod(DATASET.image_shape)
    _, closing = harden(state=state, closing_share=1.0, max_trigger_share=share)
    for labels, _, stamped in closing:
        np.testing.assert_array_equal(stamped, np.isin(labels, list(small)))


@pytest.mark.parametrize("index", [K, K + 1, K + 2])
def test_a_run_resumed_from_a_closing_step_equals_an_uninterrupted_one(index):
    rounds, _ = whole()
    more, _ = harden(state=rounds[index][0])
    one, other = more[-1][0], rounds[-1][0]
    jax.tree.map(np.testing.assert_array_equal, one.train, other.train)
    jax.tree.map(np.testing.assert_array_equal, one.bank.arrays, other.bank.arrays)
    assert [records for _, records in more] == [records for _, records in rounds[index + 1 :]]


def test_the_closing_learning_rate_falls_from_its_own_value_to_nothing():
    config = dataclasses.replace(
        CONFIG,
        max_steps=2,
        closing_steps=4,
        closing_learning_rate=0.08,
        momentum=0.0,
        weight_decay=0.0,
    )
    tx = moth.optimiser(config, DATASET)
    params = {"bias": np.zeros(1, np.float32)}
    opt_state, rates = tx.init(params), []
    for _ in range(K + 2 + 4):
        update, opt_state = tx.update({"bias": np.ones(1, np.float32)}, opt_state, params)
        rates.append(-float(update["bias"][0]))
    falling = [0.08 * (1 + np.cos(np.pi * step / 4)) / 2 for step in range(4)]
    np.testing.assert_allclose(rates, [0.01] * (K + 2) + falling, atol=1e-7)


def test_a_hardening_without_a_warm_up_closes_too():
    rounds, closing = harden(scheduler="sweep", closing_share=1.0)
    assert rounds[-1][0].step == 11
    assert any(stamped.any() for _, _, stamped in closing)


def test_the_progress_counts_the_closing_steps():
    progress = RecordedProgress()
    moth.harden(linear_classifier(K), row_variables(K), DATASET, CONFIG, progress=progress)
    assert progress.advanced == [1] * K + [3, 3, 3, 2]
    assert set(progress.figures) == {"accuracy", "loss"}


def test_a_negative_number_of_closing_steps_is_refused():
    with pytest.raises(InputError, match="closing_steps must be 0 or more, got -1"):
        MothConfig(closing_steps=-1)
