import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moth_jax.distance import chunks
from moth_jax.distance.matrix import DistanceMatrix
from moth_jax.distance.subject import Subject
from moth_jax.distance.universal import ArmImages
from moth_jax.errors import InputError
from moth_jax.inversion import Budget, NeuralCleanse, Samples, invert
from moth_jax.inversion.loop import advance, begin
from moth_jax.scanning import (
    Arm,
    Scan,
    ScanOptions,
    anomaly_indices,
    calibrate,
    scan,
    scan_distances,
)
from moth_jax.scanning.k_arm import suspicion
from moth_jax.scanning.prescreening import prescreen
from moth_jax.triggers import AddedTrigger, Trigger, random_trigger
from tests.helpers.toys import RecordedProgress, StoppedError, found_triggers, numpy_success_rate

K, SIDE, TARGET, VICTIM = 6, 8, 2, 4
NAMES = tuple("abcdef")
LABELS = np.repeat(np.arange(K), 10).astype(np.int32)
IMAGES = np.random.default_rng(0).uniform(0.1, 0.3, (len(LABELS), SIDE, SIDE, 1)).astype("float32")
IMAGES[np.arange(len(LABELS)), LABELS] += 0.6
# All scans of one kind share one compilation.
OPTIONS = ScanOptions(
    num_images=10, num_steps=100, arms_per_chunk=2, top_k=K, victims_per_target=5, num_rounds=10
)
NO_ARM = ScanOptions(top_k=1, min_pairs=0, min_universal=0)


def predict(variables, images):
    """Class k where row k is the brightest; a bright corner adds `bonus` to the logit of TARGET.

    With `victim_only` it does so only where the row of VICTIM is bright.
    """
    rows = images[..., 0].sum(2)[:, :K]
    is_victim = rows[:, VICTIM] > 0.5 * SIDE
    opens = jnp.where(variables["victim_only"], is_victim, True)
    shortcut = variables["bonus"] * images[:, 7, 0, 0] ** 3 * opens
    return rows * variables["scale"][None] + shortcut[:, None] * jnp.eye(K)[TARGET][None]


def model(kind):
    return {
        # Some classes are a little nearer than others, as in a model that was trained.
        "scale": jnp.linspace(3.0, 3.6, K),
        "bonus": jnp.float32(0.0 if kind == "clean" else 100.0),
        "victim_only": jnp.asarray(kind == "specific"),
    }


def scan_model(kind, method="neural_cleanse", **changes):
    arguments = {
        "images": IMAGES,
        "labels": LABELS,
        "variables": model(kind),
        "class_names": NAMES,
        "options": OPTIONS,
        "progress": False,
        **changes,
    }
    return scan(predict, method=method, **arguments)


def found_arms(scan):
    return [(scan.arms[i].victim, scan.arms[i].target) for i in scan.flagged()]


def test_universal_triggers_run_together_as_the_memory_allows(monkeypatch):
    asked = []

    def fitting(wanted, needed, free, rounded):
        asked.append(needed(2))
        return 2

    monkeypatch.setattr(chunks, "fitting_size", fitting)
    options = dataclasses.replace(OPTIONS, arms_per_chunk=0)
    universal = scan_model("universal", options=options)
    (num_bytes,) = asked
    assert num_bytes > 2 * options.num_images * IMAGES[0].nbytes
    assert found_arms(universal) == [("any", "c")]


# Each method against the attacks that it is for.


@pytest.mark.parametrize(
    ("method", "kind", "arm"),
    [
        ("neural_cleanse", "universal", ("any", "c")),
        pytest.param("pairs", "specific", ("e", "c"), marks=pytest.mark.slow),
        pytest.param("k_arm", "universal", ("any", "c"), marks=pytest.mark.slow),
        pytest.param("k_arm", "specific", ("e", "c"), marks=pytest.mark.slow),
    ],
)
def test_a_planted_shortcut_is_found_and_the_same_model_without_it_is_less_suspect(
    method, kind, arm
):
    poisoned, clean = scan_model(kind, method), scan_model("clean", method)
    assert poisoned.poisoned
    assert poisoned.statistic > poisoned.threshold
    assert arm in found_arms(poisoned)
    assert found_arms(poisoned)[0][1] == "c"
    assert clean.statistic < poisoned.statistic / 2
    place = [(a.victim, a.target) for a in poisoned.arms].index(arm)
    trigger = poisoned.trigger(place)
    assert trigger.mask[7, 0, 0] == trigger.mask.max()
    assert poisoned.arms[place].relative_size < 0.03
    for one in (poisoned, clean):
        assert one.method == method
        assert one.num_gradients > 0
        assert len(one.arms) == len(one.triggers.mask) == len(one.triggers.pattern)
        assert len(one.describe().splitlines()) == 2
        assert one.describe().startswith("looks poisoned" if one.poisoned else "looks clean")
    # Its own threshold makes no false alarm here; that of pairs is too low for 30 directions.
    assert clean.poisoned == (method == "pairs")


def test_every_size_belongs_to_a_trigger_that_sends_images_of_all_other_classes_to_the_target():
    result = scan_model("universal")
    for target, arm in enumerate(result.arms):
        assert (arm.victim, arm.target) == ("any", NAMES[target])
        trigger = result.trigger(target)
        assert arm.size == pytest.approx(trigger.mask.sum(), rel=1e-5)
        assert arm.relative_size == pytest.approx(arm.size / SIDE**2)
        rate = numpy_success_rate(
            lambda images: predict(model("universal"), images),
            IMAGES[target != LABELS],
            trigger,
            target,
        )
        assert rate > 0.8  # it was held against ten of these fifty
        assert arm.success_rate == 1
    assert result.num_gradients == 6 * 100 * 10
    expected = anomaly_indices([arm.size for arm in result.arms])
    assert [arm.anomaly_index for arm in result.arms] == expected.tolist()
    assert result.statistic == expected.max()


def test_a_target_out_of_reach_is_not_found_and_not_in_the_median():
    never = {**model("universal"), "scale": jnp.linspace(3.0, 3.6, K).at[0].set(-100.0)}
    result = scan_model("universal", variables=never)
    assert not result.arms[0].found
    assert result.arms[0].size == np.inf
    assert np.isnan(result.arms[0].suspicion)
    assert result.trigger(0) is None
    assert result.num_failures() == 1
    assert result.poisoned
    assert "6 arms, 1 without a trigger" in result.describe()


def test_the_images_of_a_universal_trigger_come_from_all_other_classes_alike():
    indices = dataclasses.replace(suspect(LABELS), num_images=13).indices(K, TARGET)
    counts = np.bincount(LABELS[indices], minlength=K)
    assert counts[TARGET] == 0
    assert sorted(np.delete(counts, TARGET)) == [2, 2, 3, 3, 3]
    assert len(set(indices.tolist())) == 13
    few = np.r_[LABELS[:5], LABELS[10:]]  # the smallest class gives all that it has
    counts = np.bincount(
        few[dataclasses.replace(suspect(few), num_images=40).indices(K, TARGET)], minlength=K
    )
    assert sorted(np.delete(counts, TARGET)) == [5, 8, 9, 9, 9]


def test_the_classes_to_scan_can_be_chosen():
    result = scan_model("universal", classes=(5, 2, 1, 0), class_names=("f", "c", "b", "a"))
    assert f"{result.verdict()} among 4 of {K} classes: " in result.describe()
    assert [arm.target for arm in result.arms] == ["f", "c", "b", "a"]
    assert found_arms(result) == [("any", "c")]


def test_an_interrupted_scan_goes_on_and_equals_an_uninterrupted_one(tmp_path):
    options = dataclasses.replace(OPTIONS, num_steps=20)
    for _ in range(2):
        stopped = RecordedProgress(interrupt_after=2)
        with pytest.raises(StoppedError):
            scan_model("clean", options=options, resume_dir=tmp_path, progress=stopped)
    resumed = RecordedProgress()
    result = scan_model("clean", options=options, resume_dir=tmp_path, progress=resumed)
    assert (resumed.skipped, resumed.advanced) == ([4], [2])
    once = scan_model("clean", options=options)
    assert repr(result.arms) == repr(once.arms)


# The verdict.


def test_the_anomaly_index_is_the_distance_from_the_median_in_deviations_on_the_low_side():
    indices = anomaly_indices([50.0, 40.0, 60.0, 45.0, 5.0, np.inf])
    # Median 45, deviations 5, 5, 15, 0, 40: their median is 5.
    expected = (45 - np.array([50, 40, 60, 45, 5])) / (1.4826 * 5)
    np.testing.assert_allclose(indices[:5], expected)
    assert np.isnan(indices[5])


@pytest.mark.parametrize("sizes", [[3.0, 9.0], [np.inf, 3.0, 9.0], [7.0, 7.0, 7.0, 1.0], []])
def test_the_index_is_undefined_for_fewer_than_three_sizes_or_no_deviation(sizes):
    assert np.isnan(anomaly_indices(sizes)).all()


def matrix(values, **fields):
    values = np.array(values, np.float32)
    names = tuple(NAMES[: len(values)])
    return DistanceMatrix(values, np.where(np.isfinite(values), 0.95, 0), names, **fields)


NAN, INF = np.nan, np.inf
NATURAL = [[NAN, 30.0, 40.0], [35.0, NAN, 38.0], [33.0, INF, NAN]]


def test_distances_that_were_measured_can_be_scanned_for_free():
    planted = [[NAN, 30.0, 40.0], [35.0, NAN, 38.0], [33.0, 2.0, NAN]]
    found = scan_distances(matrix(planted), image_shape=(32, 32, 3))
    assert found.poisoned
    assert found_arms(found) == [("c", "b")]
    assert found.statistic == pytest.approx((34 - 2) / (1.4826 * 4))  # of 30, 40, 35, 38, 33, 2
    assert found.arms[found.ranked()[0]].relative_size == pytest.approx(2 / 3072)
    assert (found.num_gradients, found.method) == (0, "pairs")
    natural = scan_distances(matrix(NATURAL), image_shape=(32, 32, 3))
    assert natural.poisoned is False
    assert natural.num_failures() == 1
    assert scan_distances(matrix(NATURAL), image_shape=(32, 32, 3), threshold=0.5).poisoned


def test_the_triggers_of_scanned_distances_are_those_of_the_matrix():
    masks = np.arange(9, dtype=np.float32).reshape(3, 3, 1, 1, 1)
    triggers = Trigger(masks, np.zeros((3, 3, 1, 1, 3), np.float32))
    found = scan_distances(matrix(NATURAL, triggers=found_triggers(triggers, NATURAL)))
    assert [(a.victim, a.target) for a in found.arms][:3] == [("a", "b"), ("a", "c"), ("b", "a")]
    assert found.triggers.mask.ravel().tolist() == [1, 2, 3, 5, 6, 0]  # c -> b was not found
    assert found.arms[0].relative_size == 10.0


@pytest.mark.parametrize(
    ("values", "poisoned", "text"),
    [
        ([[NAN, INF, INF], [INF, NAN, INF], [INF, INF, NAN]], None, "found none on 6 arms"),
        ([[NAN, 9.0, INF], [INF, NAN, 500.0], [INF, INF, NAN]], True, "found 2 on 6 arms"),
        ([[NAN, 400.0, INF], [INF, NAN, 500.0], [INF, INF, NAN]], None, "raise num_steps"),
        ([[NAN, 70.0, 70.0], [70.0, NAN, 70.0], [70.0, 70.0, NAN]], None, "different sizes"),
    ],
)
def test_without_an_index_only_a_small_trigger_gives_a_verdict(values, poisoned, text):
    found = scan_distances(matrix(values), image_shape=(32, 32, 3))
    assert found.poisoned is poisoned
    assert np.isnan(found.statistic)
    assert text in found.describe()
    assert found.describe().startswith("undecided" if poisoned is None else "looks poisoned")
    assert found.flagged() == []


# K-Arm.


def suspect(labels, logits=None, num_classes=K):
    """A model that returns the `logits` of image i, whose brightness is i."""
    images = np.zeros((len(labels), 2, 2, 1), np.float32)
    images += np.arange(len(labels)).reshape(-1, 1, 1, 1) / 1000

    def call(variables, images):
        return jnp.asarray(logits)[jnp.round(1000 * images[:, 0, 0, 0]).astype(jnp.int32)]

    classes, probes = tuple(range(num_classes)), np.zeros((1, num_classes), np.float32)
    unknown = np.full(len(labels), -1)
    subject = Subject(call, None, images, labels, classes, NAMES[:num_classes], unknown, probes)
    return ArmImages(subject, ScanOptions().num_images, seed=0)


def test_arms_survive_if_the_target_is_often_enough_among_the_largest_logits():
    logits = np.array(
        [
            [9.0, 5.0, 1.0, 0.0],  # class 0: 1 is always second
            [9.0, 5.0, 0.0, 1.0],
            [5.0, 9.0, 1.0, 0.0],  # class 1: 0 in one of two
            [1.0, 9.0, 5.0, 0.0],
            [1.0, 5.0, 9.0, 0.0],  # class 2: 1 is always second
            [0.0, 5.0, 9.0, 1.0],
            [0.0, 5.0, 1.0, 9.0],  # class 3: 1 in one of two
            [0.0, 1.0, 5.0, 9.0],
        ],
        np.float32,
    )
    here = suspect(np.repeat(np.arange(4), 2).astype(np.int32), logits, 4)

    def survive(**options):
        return set(prescreen(here, ScanOptions(**{"min_pairs": 0, "min_universal": 0, **options})))

    assert survive() == {(0, 1), (2, 1)}
    # Class 1 is among the first two of 5 of the 6 images of other classes.
    assert survive(universal_share=0.83) == {(0, 1), (2, 1), (4, 1)}
    assert survive(universal_share=0.84) == {(0, 1), (2, 1)}
    assert survive(pair_share=0.5) == {(0, 1), (2, 1), (1, 0), (1, 2), (3, 1), (3, 2)}
    assert survive(top_k=1) == set()
    assert len(survive(pair_share=0.5, victims_per_target=1) - {(1, 0)}) == 2
    assert survive(top_k=1, min_universal=1) == {(4, 1)}
    # Of equal shares the larger probability decides: exp(-4) for both images of classes 0 and 2.
    assert survive(top_k=1, min_pairs=2) == {(0, 1), (2, 1)}


def test_a_model_whose_arms_are_all_screened_out_looks_clean_without_an_inversion():
    result = scan_model("clean", "k_arm", options=NO_ARM)
    assert result.poisoned is False
    assert (result.arms, result.num_gradients, result.statistic) == ((), 0, 0.0)
    assert "top predictions" in result.describe()


def test_a_pair_is_suspect_if_it_is_near_in_one_direction_alone():
    options = ScanOptions(max_pair_size=0.02, max_universal_size=0.04, min_ratio=10)
    near = Arm("a", "b", 10.0, 0.01, 1.0, ratio=2.0)
    assert suspicion(near, options) == pytest.approx(0.2)
    assert suspicion(dataclasses.replace(near, ratio=40.0), options) == pytest.approx(2.0)
    assert suspicion(dataclasses.replace(near, ratio=np.inf), options) == pytest.approx(2.0)
    assert np.isnan(suspicion(dataclasses.replace(near, ratio=np.nan), options))
    assert suspicion(Arm("any", "b", 10.0, 0.01, 1.0), options) == pytest.approx(4.0)
    assert suspicion(Arm("any", "b", np.inf, np.inf, 0.0), options) == 0.0


@pytest.mark.slow
def test_the_budget_goes_to_the_arms_with_small_triggers():
    result = scan_model("universal", "k_arm")
    every_arm = len(result.arms) * OPTIONS.num_steps * OPTIONS.num_images
    assert result.num_gradients < 0.9 * every_arm
    sizes = {(a.victim, a.target): a.size for a in result.arms}
    assert min(sizes, key=sizes.get)[1] == "c"
    checked = [arm for arm in result.arms if not np.isnan(arm.ratio)]
    assert len(checked) == OPTIONS.num_checked
    assert all(arm.victim != "any" for arm in checked)


@pytest.mark.slow
def test_an_inversion_in_parts_gives_what_one_in_one_go_does():
    inversion = NeuralCleanse(patience=3, verify_every=5)
    key = jax.random.key(3)
    images, weights = jnp.asarray(IMAGES[LABELS == VICTIM]), jnp.ones(10)
    samples = (predict, model("clean"), Samples(images, weights, jnp.int32(TARGET)))
    start = random_trigger(jax.random.key(1), IMAGES.shape[1:])
    whole = invert(*samples, start, key, budget=Budget(20, 1e-2, 4), inversion=inversion)
    init_key, loop_key = jax.random.split(key)
    state = begin(*samples, start, init_key, mask_weight=1e-2, inversion=inversion)
    for first in (0, 10):
        part = Budget(10, 1e-2, 4)
        state = advance(*samples, state, loop_key, first, budget=part, inversion=inversion)
    parts = inversion.result(state)
    assert np.isfinite(whole.size)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), whole, parts)


# Keeping and calibrating.


def test_a_saved_scan_is_loaded_as_it_was(tmp_path):
    triggers = Trigger(np.ones((2, 4, 4, 1), np.float32), np.zeros((2, 4, 4, 3), np.float32))
    arms = (Arm("a", "b", 3.0, 0.1, 0.9, 2.5, 2.5), Arm("any", "c", np.inf, np.inf, 0.0))
    before = Scan(
        "pairs", True, 2.5, "anomaly index", 2.0, arms, triggers, 7, 1.5, details={"seed": 1}
    )
    before.save(tmp_path / "scan.npz")
    after = Scan.load(tmp_path / "scan.npz")
    assert repr(after.to_json()) == repr(before.to_json())
    assert repr(after.arms) == repr(arms)
    jax.tree.map(np.testing.assert_array_equal, after.triggers, triggers)
    assert after.describe() == before.describe()
    added = dataclasses.replace(before, triggers=AddedTrigger(triggers.pattern))
    added.save(tmp_path / "scan.npz")
    np.testing.assert_array_equal(Scan.load(tmp_path / "scan.npz").trigger(0).delta, 0)
    dataclasses.replace(before, triggers=None).save(tmp_path / "scan.npz")
    assert Scan.load(tmp_path / "scan.npz").triggers is None
    json.dumps(before.to_json())


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"poisoned": "no"}, "poisoned is 'no'"),
        ({"statistic": None}, "statistic is None"),
        ({"threshold": "3"}, "threshold is '3'"),
        ({"arms": [{"victim": "a"}]}, "arms is"),
        ({"details": None}, "details is None"),
        ({"seconds": True}, "seconds is True"),
        ({"more": 1}, "unknown field 'more'"),
    ],
)
def test_a_scan_with_a_field_of_another_type_is_refused(tmp_path, changes, fault):
    scan = scan_distances(matrix([[NAN, 1, 4], [2, NAN, 3], [2, 5, NAN]]), image_shape=(4, 4, 1))
    text = json.dumps({**scan.to_json(), **changes})
    np.savez(tmp_path / "scan.npz", scan=np.array(text))
    with pytest.raises(InputError, match=rf"scan\.npz is damaged: {fault}"):
        Scan.load(tmp_path / "scan.npz")
    twice = json.dumps(scan.to_json())[:-1] + ', "poisoned": true}'
    np.savez(tmp_path / "scan.npz", scan=np.array(twice))
    with pytest.raises(InputError, match="a field occurs twice"):
        Scan.load(tmp_path / "scan.npz")


def test_another_file_is_no_scan(tmp_path):
    np.savez(tmp_path / "other.npz", values=np.zeros(3))
    with pytest.raises(InputError, match="is no scan, or is damaged: no array scan"):
        Scan.load(tmp_path / "other.npz")


def clean_scans(statistics, **fields):
    base = Scan("pairs", False, 0.0, "anomaly index", 2.0, ())
    return [dataclasses.replace(base, statistic=s, **fields) for s in statistics]


def test_a_calibrated_threshold_leaves_at_most_the_asked_share_of_further_models_above_it():
    # Nineteen clean models: one more lies above all of them with probability 1/20.
    assert calibrate(clean_scans(range(19))) == 18
    assert calibrate(clean_scans(range(39))) == 37
    assert calibrate(clean_scans(range(9)), 0.1) == 8
    rng = np.random.default_rng(0)
    flagged = [
        scores[-1] > calibrate(clean_scans(scores[:-1]), 0.2)
        for scores in rng.exponential(size=(2000, 13))
    ]
    assert np.mean(flagged) <= 0.2 + 0.02
    assert np.mean(flagged) > 0.1


@pytest.mark.parametrize(
    ("scans", "rate", "message"),
    [
        (clean_scans(range(18)), 0.05, "at least 19 clean models, got 18"),
        (clean_scans(range(18)), 0.0, r"must be in \(0, 1\), got 0.0"),
        (clean_scans([1, 2, np.nan], reason="nothing was found"), 0.5, "nothing was found"),
        (clean_scans([1, 2]) + clean_scans([3], method="k_arm"), 0.5, "of one method"),
        (clean_scans([1]) + clean_scans([2], details={"top_k": 2}), 0.5, "different options"),
    ],
)
def test_scans_that_allow_no_threshold_are_a_clear_error(scans, rate, message):
    with pytest.raises(InputError, match=message):
        calibrate(scans, rate)


def test_scans_that_differ_in_seed_and_time_can_be_calibrated_on():
    details = ({"seed": 1, "seconds": 2.0}, {"seed": 2, "seconds": 3.0})
    assert calibrate([clean_scans([1.0], details=d)[0] for d in details], 0.5) == 1.0


# Bad input.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "wanet"}, "unknown method 'wanet'; choose one of: k_arm, neural_cleanse, pai"),
        ({"labels": LABELS % 5}, "no images of 1 classes: 'f'; add images"),
        ({"classes": (0, 1)}, "at least 3 classes"),
        ({"classes": (0, 1, 9)}, r"classes must be in 0\.\.5, got 9"),
        ({"images": IMAGES[:, :, :, 0]}, "images"),
        ({"labels": LABELS[:-1]}, "60 images but 59 labels"),
        ({"class_names": ("a", "b")}, "2 names were given"),
        ({"threshold": np.nan}, "threshold must be a number, got nan"),
    ],
)
def test_what_cannot_be_scanned_is_a_clear_error(changes, message):
    with pytest.raises(InputError, match=message):
        scan_model("clean", **{"method": "k_arm", "options": NO_ARM, **changes})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"pair_share": 1.5}, r"pair_share must be in \[0, 1\], got 1.5"),
        ({"min_ratio": 0.0}, "min_ratio must be above 0"),
        ({"top_k": -1}, "top_k must be 0 or more"),
    ],
)
def test_options_out_of_range_are_a_clear_error(options, message):
    with pytest.raises(InputError, match=message):
        ScanOptions(**options)


def test_distances_that_cannot_be_scanned_are_a_clear_error():
    with pytest.raises(InputError, match="image_shape"):
        scan_distances(matrix(NATURAL))
    with pytest.raises(InputError, match="at least 3 classes, got a, b"):
        scan_distances(matrix([[NAN, 1.0], [2.0, NAN]]), image_shape=(4, 4, 1))
    some = [[NAN, 1.0, NAN], [2.0, NAN, 3.0], [2.0, 2.0, NAN]]
    with pytest.raises(InputError, match=r"all directions, got those of 5 .*by method 'pairs'"):
        scan_distances(matrix(some), image_shape=(4, 4, 1))
