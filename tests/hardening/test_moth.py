import dataclasses
import functools

import jax
import numpy as np
import pytest

from moth_jax.errors import InputError
from moth_jax.evaluation import accuracy
from moth_jax.hardening import base, moth, moth_config, rounds, scheduler
from moth_jax.hardening.moth import MothConfig, MothState, harden
from moth_jax.inversion import Budget, NeuralCleanse, Trimmed
from moth_jax.run.checkpoints import RunCheckpoints
from moth_jax.training import Adversary, make_update
from tests.helpers.hardenings import equal
from tests.helpers.moths import (
    CLASSIFIER,
    CONFIG,
    DATASET,
    VARIABLES,
    K,
    as_arrays,
    assert_same_state,
    compile_once,
    recorded_programs,
    run,
)
from tests.helpers.toys import (
    RecordedProgress,
    Rounds,
    compilations,
    row_dataset,
    row_variables,
)


@pytest.fixture(autouse=True)
def calls():
    """The calls of the compiled programs, which are compiled once."""
    with recorded_programs() as calls:
        yield calls


@functools.cache
def whole_run():
    return run()


def warmed_up():
    """The state after the warm-up."""
    return whole_run()[1][K - 1][0]


def through_a_file(state, folder, **options):
    """A state that was saved and loaded."""
    saved = RunCheckpoints(folder)
    saved.save(1, *state.to_arrays())
    tx = moth.optimiser(dataclasses.replace(CONFIG, **options), DATASET)
    loaded = MothState.from_arrays(*saved.latest(), tx)
    assert vars(loaded).keys() == vars(state).keys()
    assert type(loaded.scheduler) is type(state.scheduler)
    assert_same_state(loaded, state)
    return loaded


def never(target):
    """Variables of a model that takes nothing for `target`."""
    variables = row_variables(K)
    variables["params"]["bias"] = variables["params"]["bias"].at[target].set(-1000.0)
    return variables


# The loop.


def test_every_class_is_warmed_up_and_every_step_is_recorded():
    final, rounds = whole_run()
    warm_ups, steps = [r for _, r in rounds[:K]], rounds.steps
    assert [[(r["phase"], r["target"]) for r in records] for records in warm_ups] == [
        [("warm-up", name)] for name in DATASET.class_names
    ]
    assert [len(records) for _, records in rounds[K:]] == [3, 3]
    assert [record["step"] for record in steps] == [0, 1, 2, 3, 4, 5]
    for record in steps:
        (a, b), backwards = record["directions"]
        assert backwards == [b, a]
        assert a != b
        assert record["num_victims"] == [4, 4]
        assert np.isfinite(record["sizes"]).all()
        assert min(record["success_rates"]) >= 0.9
        assert record["num_stamped"] == [1, 1]
    for _, records in rounds[K:]:
        assert len({str(record["directions"]) for record in records}) == 1
    assert (final.step, final.stopped, final.kept_step) == (6, "budget", 6)
    equal(final.kept, final.train.variables)
    assert final.scheduler.num_selected.sum() == 2 * 2
    assert not np.array_equal(final.kept["params"]["kernel"], VARIABLES["params"]["kernel"])


def test_validation_accuracy_is_measured_where_it_is_due_and_no_test_images_are_needed():
    without = dataclasses.replace(DATASET, test=None)
    final, rounds = run(without, validate_every=4, state=warmed_up(), max_steps=9)
    steps = rounds.steps
    # Checks are due after steps 4 and 8; they take place at the end of the round, and at the end.
    assert [r["step"] + 1 for r in steps if "validation_accuracy" in r] == [6, 9]
    measured = accuracy(CLASSIFIER.predict, final.train.variables, DATASET.validation)
    assert final.accuracy == measured == steps[-1]["validation_accuracy"]


@pytest.mark.parametrize("index", range(K + 2))
def test_a_run_saved_and_resumed_from_any_round_equals_an_uninterrupted_one(index, tmp_path):
    final, rounds = whole_run()
    resumed, more = run(state=through_a_file(rounds[index][0], tmp_path))
    assert_same_state(resumed, final)
    assert [records for _, records in more] == [records for _, records in rounds[index + 1 :]]


def test_a_run_that_forgets_triggers_and_is_resumed_equals_one_that_is_not(monkeypatch, tmp_path):
    monkeypatch.setattr(moth, "_MEGABYTE", 300 / CONFIG.trigger_memory_mb)  # two triggers
    final, rounds = run()
    assert len(final.bank.arrays["direction"]) == 2
    assert_same_state(run(state=through_a_file(rounds[K][0], tmp_path))[0], final)


def test_a_state_that_was_handed_out_does_not_change_later():
    seen = []
    rounds = Rounds()

    def on_round(state, records):
        seen.append(as_arrays(state))
        rounds(state, records)

    harden(CLASSIFIER, VARIABLES, DATASET, CONFIG, on_round=on_round, progress=False)
    for (state, _), copied in zip(rounds, seen, strict=True):
        equal(as_arrays(state), copied)


def test_the_progress_shows_classes_and_steps():
    progress = RecordedProgress()
    config = dataclasses.replace(CONFIG, max_steps=5)
    harden(CLASSIFIER, VARIABLES, DATASET, config, progress=progress)
    assert progress.advanced == [1] * K + [3, 2]
    assert progress.figures["accuracy"] == 1
    assert " -> " in progress.figures["pair"]


@pytest.mark.parametrize(
    ("options", "num_images", "num_steps"),
    [
        ({}, 5085, 79),
        ({"epochs": 0.5, "batch_size": 100}, 1000, 5),
        ({"epochs": 0.001}, 1000, 1),
        ({"max_steps": 7}, 5085, 7),
    ],
)
def test_the_length_is_given_in_epochs_or_in_steps(options, num_images, num_steps):
    assert MothConfig(**options).num_steps(num_images) == num_steps


# The warm-up.


@pytest.mark.parametrize("classes", [(), (3, 0, 2)])
def test_the_warm_up_gives_every_direction_its_targets_universal_trigger_size_and_prior(
    calls, classes
):
    count = len(classes) or K
    state = run(stop_after=count, classes=classes)[1][-1][0]
    results = [result for _, _, result in calls["invert_towards"]]
    assert len(results) == count
    for target, result in enumerate(results):
        others = np.arange(count) != target
        assert result.trigger.mask.shape[0] == 1
        np.testing.assert_array_equal(state.warmup_sizes[others, target], result.sizes)
        np.testing.assert_array_equal(state.warmup_prior[others, target], result.prior)
        for victim in np.flatnonzero(others):
            start = state.bank.start(victim, target)
            np.testing.assert_array_equal(start.mask, result.trigger.mask[0])
            np.testing.assert_array_equal(start.pattern, result.trigger.pattern[0])
    assert np.isinf(np.diag(state.warmup_sizes)).all()
    assert not state.scheduler.pairwise.any()
    assert (state.scheduler.prior[~np.eye(count, dtype=bool)] > 0).all()


def test_every_target_is_warmed_up_with_the_warm_up_budget_from_a_start_of_its_own(calls):
    run(stop_after=K)
    inversions = calls["invert_towards"]
    assert [o["budget"] for _, o, _ in inversions] == [Budget(15, 1e-3, 8)] * K
    keys = {np.asarray(jax.random.key_data(args[3])).tobytes() for args, _, _ in inversions}
    assert len(keys) == K


def test_the_images_of_a_warm_up_are_bounded_however_many_the_classes(calls):
    run(stop_after=1, warmup_max_images=7)
    (_, samples, *_), _, _ = calls["invert_towards"][0]
    assert samples.weights.shape == (K - 1, 2)


def test_the_warm_up_trains_with_the_trigger_on_half_of_the_other_classes_and_true_labels(calls):
    run(stop_after=K)
    updates, inversions = calls["stamped_update"], calls["invert_towards"]
    update = jax.jit(make_update(CLASSIFIER, moth.optimiser(CONFIG, DATASET)))
    share, others = 0, 0
    for target, ((args, _, (after, loss)), (_, _, found)) in enumerate(
        zip(updates, inversions, strict=True)
    ):
        state, images, labels, _, where, _ = args
        images = np.asarray(images)
        assert not where[labels == target].any()
        assert len(images) == CONFIG.batch_size
        mask, pattern = np.array(found.trigger.mask[0]), np.array(found.trigger.pattern[0])
        stamped = images.copy()
        stamped[where] = (1 - mask) * images[where] + mask * pattern
        expected, expected_loss = update(state, stamped, labels)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7),
            after.variables,
            expected.variables,
        )
        assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
        share, others = share + where.sum(), others + (labels != target).sum()
    assert others > 40
    assert 0.3 < share / others < 0.7


def test_the_warm_up_stamps_no_trigger_above_the_limit(calls):
    sizes = run(stop_after=K)[1][-1][0].warmup_sizes
    sizes = np.where(np.eye(K), 0, sizes).max(0)
    limit = float(np.sort(sizes)[1])  # two of the targets' triggers are not above it
    run(stop_after=K, max_trigger_share=limit / np.prod(DATASET.image_shape))
    stamped = [args[4].any() for args, _, _ in calls["stamped_update"][K:]]
    found = [np.asarray(result.sizes).max() for _, _, result in calls["invert_towards"][K:]]
    assert stamped == [size <= limit for size in found]
    assert {True, False} == set(stamped)


def test_without_approximation_the_warm_up_inverts_every_direction_by_itself(calls):
    state = run(stop_after=K, approximate_warmup=False)[1][-1][0]
    for target, (_, _, result) in enumerate(calls["invert_towards"]):
        victims = [k for k in range(K) if k != target]
        assert result.trigger.mask.shape[0] == K - 1
        for i, victim in enumerate(victims):
            start = state.bank.start(victim, target)
            np.testing.assert_array_equal(start.mask, result.trigger.mask[i])
            assert state.warmup_sizes[victim, target] == result.sizes[i]
    assert len(set(state.warmup_sizes[1:, 0].tolist())) == K - 1
    assert (state.bank.arrays["direction"] >= 0).all()  # no universal one
    assert (state.scheduler.pairwise == ~np.eye(K, dtype=bool)).all()


def test_universal_triggers_beside_the_own_count_where_they_are_unusual(calls, monkeypatch):
    asked, shared = [], np.zeros((K, K), bool)
    shared[[0, 1], 2] = True
    monkeypatch.setattr(rounds, "unusual_universals", lambda *sizes: asked.append(sizes) or shared)
    both = {"approximate_warmup": False, "universal_too": True}
    state = run(stop_after=K, **both)[1][-1][0]
    own, universal = (
        [result for _, _, result in calls[name]] for name in ("invert_towards", "invert_universal")
    )
    ((own_sizes, universal_sizes),) = asked
    np.testing.assert_array_equal(own_sizes, state.warmup_sizes)
    np.testing.assert_array_equal(universal_sizes, [result.sizes[0] for result in universal])
    np.testing.assert_array_equal(universal_sizes, state.universal_sizes)
    for target in range(K):
        for i, victim in enumerate(k for k in range(K) if k != target):
            takes = shared[victim, target]
            trigger, row = (universal, 0) if takes else (own, i)
            start = state.bank.start(victim, target)
            np.testing.assert_array_equal(start.mask, trigger[target].trigger.mask[row])
            size = (universal if takes else own)[target].sizes[i]
            assert state.scheduler.size[victim, target] == size
            assert state.scheduler.pairwise[victim, target] == (not takes)


def test_the_own_triggers_of_a_warm_up_are_the_same_beside_universal_ones(calls):
    run(stop_after=1, approximate_warmup=False)
    records = run(stop_after=1, approximate_warmup=False, universal_too=True)[1][-1][1]
    (*_, alone), (*_, beside) = calls["invert_towards"]
    np.testing.assert_array_equal(alone.sizes, beside.sizes)
    ((_, _, universal),) = calls["invert_universal"]
    assert universal.trigger.mask.shape[0] == 1
    assert records[0]["universal_size"] == universal.sizes[0]


def test_a_warm_up_with_universal_triggers_beside_the_own_goes_on_where_it_stopped(tmp_path):
    both = {"approximate_warmup": False, "universal_too": True}
    final, rounds = run(**both)
    state = through_a_file(rounds[1][0], tmp_path, **both)
    assert_same_state(run(state=state, **both)[0], final)


def test_a_target_whose_warm_up_fails_has_no_prior_no_size_and_no_trigger():
    state = run(variables=never(3), stop_after=K)[1][-1][0]
    assert np.isinf(state.warmup_sizes[:, 3]).all()
    assert not state.warmup_prior[:, 3].any()
    assert state.bank.start(0, 3) is None
    assert np.isfinite(state.warmup_sizes[1, 0])


# Budgets and starts of the inversions: dynamic adjustment.


def steps_of(calls):
    """(start, budget, info) of each main training step."""
    return [(args[3], options["budget"], result[1]) for args, options, result in calls["step"]]


def test_a_round_starts_from_the_stored_triggers_and_goes_on_from_those_just_found(calls):
    state = warmed_up()
    calls["step"].clear()
    _, rounds = run(state=state)
    steps = steps_of(calls)
    # The short ones are the last part of a full one.
    full, short = Budget(15, 1e-3, 8), Budget(6, 1e-2, 8, steps_before=9)
    assert [budget for _, budget, _ in steps] == [full, short, short] * 2
    assert [r["inversion_steps"] for r in rounds.steps] == [15, 6, 6] * 2
    before = [warmed_up(), rounds[0][0]]
    for i, (start, _, info) in enumerate(steps):
        if i % 3 == 0:
            directions = rounds.steps[i]["directions"]
            for j, names in enumerate(directions):
                victim, target = (DATASET.class_names.index(name) for name in names)
                stored = before[i // 3].bank.copy().start(victim, target)
                np.testing.assert_array_equal(start.mask[j], stored.mask)
                np.testing.assert_array_equal(start.pattern[j], stored.pattern)
        if i % 3 < 2:
            equal(steps[i + 1][0], info.trigger)


def test_after_a_failure_in_either_direction_the_full_budget_is_given_again(calls):
    # Nothing is taken for class 3: wherever it is in the pair, one direction fails.
    _, rounds = run(variables=never(3), scheduler="uniform", max_steps=12)
    kinds = set()
    for _, records in rounds[K:]:
        budgets = [record["inversion_steps"] for record in records]
        failed = "row3" in records[0]["directions"][0]
        kinds.add(failed)
        assert budgets == ([15] * 3 if failed else [15, 6, 6])
        for record in records:
            assert failed == bool(np.isinf(record["sizes"]).any())
            assert sorted(record["num_stamped"]) == ([0, 1] if failed else [1, 1])
    assert kinds == {True, False}
    budgets = [budget for _, budget, _ in steps_of(calls)]
    assert {(b.num_steps, b.mask_weight) for b in budgets} == {(15, 1e-3), (6, 1e-2)}


def test_without_dynamic_adjustment_every_inversion_starts_at_random_with_the_full_budget(calls):
    run(state=warmed_up(), dynamic=False)
    steps = steps_of(calls)
    assert all(budget == Budget(15, 1e-3, 8) for _, budget, _ in steps)
    starts = {np.asarray(step[0].mask[i]).tobytes() for step in steps for i in (0, 1)}
    assert len(starts) == 12
    for start, *_ in steps:
        assert 0.2 < start.mask.mean() < 0.8


def test_the_store_keeps_the_largest_trigger_of_a_direction(calls):
    final, rounds = run(state=warmed_up())
    largest = {}
    for (*_, info), record in zip(steps_of(calls), rounds.steps, strict=True):
        for i, names in enumerate(record["directions"]):
            direction = tuple(DATASET.class_names.index(name) for name in names)
            if info.sizes[i] > largest.get(direction, (0,))[0]:
                largest[direction] = info.sizes[i], info.trigger.mask[i]
    assert len(largest) >= 2
    for direction, (_, mask) in largest.items():
        np.testing.assert_array_equal(final.bank.start(*direction).mask, mask)


# The scheduler.


def test_the_scheduler_is_told_the_sizes_of_the_round():
    before, (_, rounds) = warmed_up(), run(state=warmed_up(), max_steps=3)
    after = rounds[0][0].scheduler
    names = rounds.steps[0]["directions"]
    for i, direction in enumerate(names):
        a, b = (DATASET.class_names.index(name) for name in direction)
        sizes = [record["sizes"][i] for record in rounds.steps]
        assert after.size[a, b] == pytest.approx(np.mean(sizes), rel=1e-6)
        assert after.pairwise[a, b]
        assert not before.scheduler.pairwise[a, b]
        assert after.num_selected[a, b] == 1


@pytest.mark.parametrize(
    ("options", "random_share"),
    [
        ({}, 0.3),
        ({"random_share": 0.1}, 0.1),
        ({"scheduler": "nearest"}, 0.3),
        ({"scheduler": "uniform"}, 1),
    ],
)
def test_the_switches_decide_how_often_a_pair_is_random(monkeypatch, options, random_share):
    given = []

    def select_pairs(state, num_steps, rng, *, num_pairs, random_share, nearest, sums):
        given.append((num_steps, num_pairs, random_share))
        assert nearest == (options.get("scheduler") == "nearest")
        return [(1, 2)]

    start = warmed_up()
    monkeypatch.setattr(scheduler, "select_pairs", select_pairs)
    run(state=start, **options)
    assert given == [(0, 1, random_share), (3, 1, random_share)]


def test_the_nearest_pair_of_the_warm_up_is_hardened_first():
    state = warmed_up()
    _, rounds = run(state=state, scheduler="nearest", random_share=0.0, max_steps=3)
    sizes = np.where(np.eye(K), np.inf, state.warmup_sizes)
    target = DATASET.class_names[sizes.min(0).argmin()]  # whose universal trigger is the smallest
    assert all(target in record["directions"][0] for record in rounds.steps)


def test_without_the_symmetric_step_one_direction_is_hardened_at_a_time():
    _, rounds = run(state=warmed_up(), symmetric=False, steps_per_round=1, max_steps=12)
    directions = [record["directions"] for record in rounds.steps]
    assert all(len(d) == 1 for d in directions)
    numbers = [[DATASET.class_names.index(name) for name in d[0]] for d in directions]
    assert {a < b for a, b in numbers} == {True, False}
    assert all(record["num_victims"] == [4] for record in rounds.steps)
    assert all(record["num_stamped"] == [1] for record in rounds.steps)


def test_two_disjoint_pairs_can_be_hardened_in_one_step():
    final, rounds = run(state=warmed_up(), pairs_per_step=2, max_steps=3)
    for record in rounds.steps:
        names = [tuple(d) for d in record["directions"]]
        assert names[1] == names[0][::-1]
        assert names[3] == names[2][::-1]
        assert {name for d in names for name in d} == set(DATASET.class_names)
        assert record["num_victims"] == [4] * 4
        assert record["num_stamped"] == [1] * 4
    assert final.scheduler.num_selected.sum() == 4


def test_a_class_with_fewer_samples_than_a_batch_asks_for_is_hardened_with_what_there_is():
    small = row_dataset([12, 12, 12, 2])
    _, rounds = run(small, scheduler="uniform", max_steps=12)
    counted = {
        d[0]: n
        for record in rounds.steps
        for d, n in zip(record["directions"], record["num_victims"], strict=True)
    }
    assert counted.pop("row3") == 2
    assert counted
    assert set(counted.values()) == {4}


# Stopping.


STOPS = {
    "falls past the bound": ([0.95, 0.95, 0.945, 0.93, 0.95], 0.01, "accuracy", 9, 6),
    "falls at once": ([0.95, 0.90], 0.01, "accuracy", 3, 0),
    "falls from the best only": ([0.95, 0.96, 0.97, 0.955, 0.95], 0.01, "budget", 12, 12),
    "ends within the bound": ([0.95, 0.96, 0.97, 0.95, 0.945], 0.01, "budget", 12, 12),
    "exactly the bound": ([0.95, 0.94, 0.94, 0.94, 0.94], 0.01, "budget", 12, 12),
    "falls at the end": ([0.95, 0.94, 0.94, 0.94, 0.93], 0.01, "accuracy", 12, 9),
    "no bound": ([0.95, 0.5, 0.4, 0.3, 0.0], 1.0, "budget", 12, 12),
    "any fall": ([0.95, 0.94, 0.949, 0.949, 0.949], 0.0, "accuracy", 3, 0),
    "no fall": ([0.95, 0.95, 0.95, 0.95, 0.95], 0.0, "budget", 12, 12),
}


@pytest.mark.parametrize(
    ("accuracies", "bound", "stopped", "step", "kept_step"), STOPS.values(), ids=STOPS
)
def test_hardening_stops_past_the_bound_and_returns_the_last_state_within_it(
    monkeypatch, accuracies, bound, stopped, step, kept_step
):
    script = iter(accuracies[1:])
    monkeypatch.setattr(base, "accuracy", lambda *_: next(script))
    start = dataclasses.replace(warmed_up(), initial_accuracy=accuracies[0])
    final, rounds = run(
        state=start, max_accuracy_drop=bound, max_steps=12, first_steps=2, next_steps=1
    )
    assert (final.stopped, final.step, final.kept_step) == (stopped, step, kept_step)
    states = {0: start.kept, **{state.step: state.train.variables for state, _ in rounds}}
    equal(final.kept, states[kept_step])


# Options.


def step_configs(monkeypatch, dataset, *changes):
    """What the steps are made with, with each of these `changes` of the options."""
    given = []
    monkeypatch.setattr(moth, "make_harden_step", lambda *args: given.append(args[3]))
    for options in changes:
        compile_once.__wrapped__(CLASSIFIER, dataset, dataclasses.replace(CONFIG, **options))
    return given


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("stamp_share", 0.2),
        ("max_trigger_share", 0.4),
        ("symmetric", False),
        ("batch_norm", "frozen"),
        ("adversary", Adversary(epsilon=0.1)),
    ],
)
def test_the_options_of_a_step_reach_it(monkeypatch, option, value):
    default, changed = step_configs(monkeypatch, DATASET, {}, {option: value})
    assert value != getattr(default, option)
    assert changed == dataclasses.replace(default, **{option: value})


FALL = [(1 + np.sqrt(0.5)) / 2, 0.5, (1 - np.sqrt(0.5)) / 2]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "constant"}, [1] * 8),
        ({"schedule": "cosine"}, [1] * (K + 1) + FALL),
        ({"schedule": "cosine", "classes": (3, 0, 2)}, [1] * (3 + 1) + FALL),
    ],
)
def test_the_learning_rate_is_constant_or_falls_after_the_warm_up(options, expected):
    # A step of warm-up for each class, and four of main training.
    options = {**options, "max_steps": 4, "momentum": 0.0, "weight_decay": 0.0}
    tx = moth.optimiser(dataclasses.replace(CONFIG, **options), DATASET)
    params = {"bias": np.zeros(1, np.float32)}
    opt_state = tx.init(params)
    rates = []
    for _ in expected:
        update, opt_state = tx.update({"bias": np.ones(1, np.float32)}, opt_state, params)
        rates.append(-float(update["bias"][0]) / CONFIG.learning_rate)
    np.testing.assert_allclose(rates, expected, atol=1e-5)


def test_augmentation_is_what_the_data_set_allows_and_can_be_turned_off(monkeypatch):
    dataset = row_dataset([12] * K, flip=True, shift=1)
    on, off = step_configs(monkeypatch, dataset, {"augment": True}, {"augment": False})
    assert (on.flip, on.shift) == (True, 1)
    assert (off.flip, off.shift) == (False, 0)


def test_the_inversions_have_the_bounds_and_the_patience_that_were_asked_for(monkeypatch):
    given = []

    def create(name, **options):
        given.append((name, options["success_bound"], options["patience"]))
        return original(name, **options)

    original = moth_config.create
    config = dataclasses.replace(CONFIG, success_bound=0.8, warmup_success_bound=0.95, patience=4)
    monkeypatch.setattr(moth_config, "create", create)
    compile_once.__wrapped__(CLASSIFIER, DATASET, config)
    assert set(given) == {("neural_cleanse", 0.8, 4), ("neural_cleanse", 0.95, 4)}


def test_another_inversion_can_be_chosen_and_has_no_patience():
    config = dataclasses.replace(CONFIG, inversion="trimmed", patience=None)
    assert config.inversion_at(0.8) == Trimmed(success_bound=0.8)
    assert MothConfig().inversion_at(0.8) == NeuralCleanse(success_bound=0.8, patience=10)
    with pytest.raises(InputError, match="the inversion 'trimmed' has no option 'patience'"):
        dataclasses.replace(CONFIG, inversion="trimmed", patience=4)
    with pytest.raises(InputError, match=r"unknown inversion 'guess'.*, pixel, trimmed"):
        dataclasses.replace(CONFIG, inversion="guess")
    with pytest.raises(InputError, match="'pixel' finds triggers that are added to images, and"):
        dataclasses.replace(CONFIG, inversion="pixel")


AT_LEAST_1 = (
    *("steps_per_round", "validate_every", "victims_per_class", "pairs_per_step", "first_steps"),
    *("trigger_memory_mb", "warmup_images_per_class", "warmup_max_images", "minibatch_size"),
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"universal_too": True}, "universal_too is for a warm-up that inverts every direction"),
        ({"scheduler": "bandit"}, "unknown scheduler 'bandit'.*k_arm, nearest, sweep, uniform"),
        ({"schedule": "linear"}, "unknown schedule 'linear'.*constant, cosine"),
        ({"max_accuracy_drop": 1.5}, r"max_accuracy_drop must be in \[0, 1\], got 1.5"),
        ({"success_bound": 90}, r"success_bound must be in \(0, 1\], got 90"),
        ({"warmup_success_bound": 99}, r"warmup_success_bound must be in \(0, 1\], got 99"),
        ({"max_trigger_share": 25}, r"max_trigger_share must be in \[0, 1\], got 25"),
        ({"random_share": 30}, r"random_share must be in \[0, 1\], got 30"),
        *(({name: 0}, f"{name} must be at least 1, got 0") for name in AT_LEAST_1),
        ({"classes": (2,)}, "at least 2 different classes, got 2"),
        ({"classes": (2, 2)}, "at least 2 different classes, got 2"),
        ({"batch_size": 16}, "batch_size 16 has no room for 16 samples of each of 2 classes"),
        ({"pairs_per_step": 5}, "batch_size 128 has no room for 16 samples of each of 10 classes"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        MothConfig(**options)


def test_a_second_hardening_with_another_seed_compiles_nothing(monkeypatch):
    monkeypatch.setattr(moth, "_compile", compile_once.__wrapped__)
    programs = []
    for seed in (0, 1):
        config = dataclasses.replace(CONFIG, seed=seed, max_steps=3)
        with compilations() as names:
            harden(CLASSIFIER, VARIABLES, DATASET, config, progress=False)
        programs.append(list(names))
    assert programs[0].count("jit(step)") == 1  # with both budgets
    assert programs[1] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_norm": "train"}, "unknown batch_norm mode 'train'"),
        ({"classes": (0, 4)}, r"classes must be in 0\.\.3, got 4"),
        ({"classes": (0, 1, 2), "pairs_per_step": 2}, r"must be in 1\.\.1 for 3 classes, got 2"),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_the_warm_up(monkeypatch, options, message):
    monkeypatch.setattr(moth, "_compile", compile_once.__wrapped__)
    rounds = Rounds(stop_after=1)
    config = dataclasses.replace(CONFIG, **options)
    with pytest.raises(InputError, match=message):
        harden(CLASSIFIER, VARIABLES, DATASET, config, on_round=rounds, progress=False)
    assert rounds == []
