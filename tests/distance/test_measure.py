import gc
import io
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moth_jax import distance
from moth_jax.distance import chunks
from moth_jax.distance.subject import check_seeds
from moth_jax.errors import InputError
from moth_jax.inversion import InversionResult, NeuralCleanse, Trimmed, directions
from moth_jax.progress import console_progress
from moth_jax.triggers import Trigger, stamp
from tests.helpers.toys import (
    RecordedProgress,
    StoppedError,
    linear_classifier,
    numpy_success_rate,
    row_images,
    row_variables,
)

CLASSIFIER = linear_classifier()
VARIABLES = row_variables()
LABELS = np.repeat([0, 1, 2], 8).astype(np.int32)
IMAGES = row_images(LABELS)
TRACES = []


def rows(variables, images):
    TRACES.append(images.shape)
    return CLASSIFIER.predict(variables, images)


def measure(images=IMAGES, labels=LABELS, **options):
    """Measure the three rows; all calls of one shape share one compilation."""
    defaults = {
        "variables": VARIABLES,
        "num_steps": 30,
        "minibatch_size": 4,
        "directions_per_chunk": 2,
        "inversion": NeuralCleanse(patience=3, verify_every=5),
    }
    return measure_function(rows, images, labels, **{**defaults, **options})


def measure_function(logits_fn, images=IMAGES, labels=LABELS, **options):
    """Measure another model, or with the library's own defaults."""
    return distance.distance_matrix(logits_fn, images, labels, **{"progress": False, **options})


@pytest.fixture(scope="module")
def matrix():
    """All six directions, uninterrupted."""
    return measure()


@pytest.mark.parametrize("inversion", ["neural_cleanse", "pixel", "trimmed"])
@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_changed_pixels_are_those_of_the_very_trigger_on_the_images_measured(inversion, seeds):
    found = measure(inversion=inversion, seeds=seeds, num_steps=100, num_images=6)
    assert found.num_failures() == 0
    for victim, target in found.smallest(6):
        victims = IMAGES[victim == LABELS][:6]
        change = np.abs(np.asarray(stamp(victims, found.trigger(victim, target))) - victims)
        pixels = (change.max((0, 3)) >= 1 / 255 - 1e-6).sum()
        assert found.changed_pixels[victim, target] == pixels > 0
    np.testing.assert_array_equal(np.isnan(found.changed_pixels), np.isnan(found.values))


def test_a_direction_without_a_trigger_has_no_number_of_changed_pixels():
    always_class_0 = jax.tree.map(jnp.zeros_like, VARIABLES)
    always_class_0["params"]["bias"] = jnp.array([3.0, 0.0, 0.0])
    found = measure(variables=always_class_0, directions=[(1, 2)], check_order=False)
    assert np.isposinf(found.changed_pixels[1, 2])


def assert_same_matrix(one, other):
    np.testing.assert_array_equal(one.values, other.values)
    np.testing.assert_array_equal(one.values_per_seed, other.values_per_seed)
    np.testing.assert_array_equal(one.success_rate, other.success_rate)
    np.testing.assert_array_equal(one.changed_pixels, other.changed_pixels)
    jax.tree.map(np.testing.assert_array_equal, one.triggers, other.triggers)


# Distances that are known.


def decides_on_one_pixel(images):
    """Class 1 if pixel (1, 2) is bright."""
    level = images[:, 1, 2].mean(-1)
    return 40 * jnp.stack([0.5 - level, level - 0.5], axis=1)


def test_a_distance_comes_close_to_the_optimum_for_nine_in_ten_samples_and_not_below_it():
    levels = np.linspace(0.02, 0.3, 10)
    images = np.random.default_rng(0).random((20, 4, 4, 3)).astype(np.float32)
    images[:10, 1, 2] = levels[:, None]
    images[10:, 1, 2] = 1 - levels[:, None]
    found = measure_function(decides_on_one_pixel, images, np.repeat([0, 1], 10), num_steps=600)
    # (1 - m) * level + m = 1/2 for the darkest but one: the darkest may be missed.
    best = 3 * (0.5 - levels[1]) / (1 - levels[1])
    for direction in ((0, 1), (1, 0)):
        assert best <= found.values[direction] <= 1.05 * best
        assert found.success_rate[direction] == pytest.approx(0.9)
        mask = found.trigger(*direction).mask
        assert mask[1, 2, 0] == mask.max()
        assert 3 * mask[1, 2, 0] == pytest.approx(best, rel=0.02)


@pytest.mark.parametrize(
    ("inversion", "num_steps"),
    [(NeuralCleanse(), 200), (Trimmed(), 400)],
    ids=["published", "trimmed"],
)
def test_where_every_pixel_does_as_well_each_method_comes_close_to_the_closed_form(
    inversion, num_steps
):
    def brightness(images):
        level = images.mean((1, 2, 3))
        return 20 * jnp.stack([0.5 - level, level - 0.5], axis=1)

    images = np.concatenate([np.full((4, 4, 4, 1), level, np.float32) for level in (0.1, 0.9)])
    labels, options = np.repeat([0, 1], 4), {"num_steps": num_steps, "inversion": inversion}
    found = measure_function(brightness, images, labels, **options)
    best = 16 * (0.5 - 0.1) / (1 - 0.1)
    assert 0.999 * best < found.values[0, 1] < 7.5


# What is reported.


def test_every_reported_size_belongs_to_a_trigger_that_reaches_the_bound(matrix):
    assert matrix.num_measured() == 6
    assert matrix.num_failures() == 0
    for a, b in np.argwhere(matrix.found):
        trigger = matrix.trigger(a, b)
        rate = numpy_success_rate(
            lambda x: CLASSIFIER.predict(VARIABLES, x), IMAGES[a == LABELS], trigger, b
        )
        assert rate == pytest.approx(matrix.success_rate[a, b])
        assert rate >= 0.9
        assert matrix.values[a, b] == pytest.approx(trigger.mask.sum(), rel=1e-5)
    assert np.isnan(np.diag(matrix.values)).all()
    assert np.isnan(np.diag(matrix.success_rate)).all()


def test_only_the_first_images_of_a_class_are_used(matrix):
    more = np.concatenate([IMAGES, row_images(LABELS, seed=9)])
    same = measure(more, np.concatenate([LABELS, LABELS]), num_images=8)
    assert_same_matrix(same, matrix)


def test_labels_need_no_order(matrix):
    order = np.argsort(np.tile(np.arange(8), 3), kind="stable")
    shuffled = measure(IMAGES[order], LABELS[order])
    assert_same_matrix(shuffled, matrix)


def test_a_direction_without_a_trigger_is_infinite_counted_and_not_averaged_in():
    never_class_2 = row_variables()
    never_class_2["params"]["bias"] = jnp.array([0.0, 0.0, -1000.0])
    progress = RecordedProgress()
    found = measure(variables=never_class_2, directions=[(0, 1), (0, 2)], progress=progress)
    assert np.isposinf(found.values[0, 2])
    assert found.success_rate[0, 2] == 0
    assert found.trigger(0, 2) is None
    assert found.num_failures() == 1
    assert found.num_measured() == 2
    assert found.average() == pytest.approx(found.values[0, 1])
    assert np.isfinite(found.values[0, 1])
    assert progress.figures == {"average": pytest.approx(found.values[0, 1]), "failures": 1}
    measure(variables=never_class_2, directions=[(0, 2)], progress=progress)
    assert progress.figures == {"average": "none found", "failures": 1}


def test_a_success_rate_of_exactly_the_bound_is_found_with_any_number_of_seeds():
    def always_class_1(images):
        return jnp.broadcast_to(jnp.array([[0.0, 2.0]]), (len(images), 2))

    # 41 times the reciprocal of 41 is less than 1 in single precision.
    images, labels = np.zeros((41, 2, 2, 1), np.float32), np.zeros(41, np.int32)
    options = {"directions": [(0, 1)], "num_steps": 2, "seeds": (0, 1)}
    inversion = NeuralCleanse(success_bound=1.0)
    found = measure_function(always_class_1, images, labels, inversion=inversion, **options)
    assert found.num_failures() == 0


# Seeds, directions and chunks.


def test_several_seeds_give_what_each_gives_alone_and_the_smallest_counts(matrix):
    together = measure(seeds=(0, 5, 7), directions=[(0, 1), (2, 0)])
    for i, seed in enumerate((0, 5, 7)):
        alone = measure(seeds=(seed,), directions=[(0, 1), (2, 0)])
        np.testing.assert_allclose(together.values_per_seed[i], alone.values, rtol=2e-3)
    np.testing.assert_array_equal(together.values, together.values_per_seed.min(0))
    for direction in ((0, 1), (2, 0)):
        sizes = together.values_per_seed[:, *direction]
        assert len(set(sizes.tolist())) == 3
        assert together.trigger(*direction).mask.sum() == pytest.approx(sizes.min(), rel=1e-5)
    np.testing.assert_array_equal(together.values_per_seed[0, 1], [np.nan] * 3)


def test_some_directions_give_the_numbers_they_have_in_the_whole_matrix(matrix):
    some = measure(directions=[(2, 1), (0, 2), (1, 0)])
    for direction in ((2, 1), (0, 2), (1, 0)):
        assert some.values[direction] == matrix.values[direction]
        assert some.success_rate[direction] == matrix.success_rate[direction]
    assert some.num_measured() == 3


def test_one_compilation_serves_all_chunks_budgets_batches_and_weights(matrix):
    compiled, traced = directions.invert_with_seeds._cache_size(), len(TRACES)
    measure(num_steps=3)
    measure(mask_weight=0.1, num_steps=2, seeds=(3,))
    measure(row_images(LABELS, seed=4), num_steps=2, directions=[(0, 1), (0, 2), (1, 2)])
    measure(variables=row_variables(scale=2.0), num_steps=2)
    assert directions.invert_with_seeds._cache_size() == compiled
    assert len(TRACES) == traced


# Some of the classes of a larger head.


def test_among_chosen_classes_every_direction_has_the_number_it_has_in_the_whole_matrix(matrix):
    chosen = measure(classes=(2, 0), class_names=("a", "b", "c"))
    assert chosen.values.shape == (2, 2)
    assert chosen.class_names == ("c", "a")
    for (i, j), direction in {(0, 1): (2, 0), (1, 0): (0, 2)}.items():
        assert chosen.values[i, j] == matrix.values[direction]
        assert chosen.success_rate[i, j] == matrix.success_rate[direction]
        np.testing.assert_array_equal(chosen.trigger(i, j).mask, matrix.trigger(*direction).mask)
    assert np.isnan(np.diag(chosen.values)).all()
    assert chosen.details["classes"] == [2, 0]
    assert "classes" not in matrix.details


def test_directions_among_chosen_classes_are_given_as_labels(matrix):
    one = measure(classes=(2, 0), directions=[(2, 0)])
    assert one.values[0, 1] == matrix.values[2, 0]
    assert one.num_measured() == 1
    assert one.class_names == ("2", "0")


def test_a_trigger_has_to_beat_the_classes_that_were_not_chosen_too(matrix):
    # Class 2 wins wherever class 1 would: no trigger makes class 1 the largest of all three.
    shadowed = row_variables()
    shadowed["params"]["kernel"] = (
        shadowed["params"]["kernel"].at[:, 2].set(shadowed["params"]["kernel"][:, 1])
    )
    shadowed["params"]["bias"] = jnp.array([0.0, 0.0, 1.0])
    found = measure(variables=shadowed, classes=(0, 1), directions=[(0, 1)])
    assert found.num_failures() == 1
    assert matrix.num_failures() == 0


def test_the_chosen_classes_can_be_named_alone_and_those_without_images_left_out():
    kept = LABELS != 1
    some = measure(IMAGES[kept], LABELS[kept], classes=(0, 2), class_names=("first", "last"))
    assert some.class_names == ("first", "last")
    assert some.num_measured() == 2


def test_a_measurement_among_some_classes_goes_on_from_the_chunks_of_another(tmp_path):
    measure(directions=[(0, 2), (2, 0)], resume_dir=tmp_path)
    progress = RecordedProgress()
    measure(classes=(0, 2), resume_dir=tmp_path, progress=progress)
    assert progress.skipped == [2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": (0, 3)}, r"classes must be in 0\.\.2, got 3"),
        ({"classes": (-1, 1)}, r"classes must be in 0\.\.2, got -1"),
        ({"classes": (1,)}, "at least 2 different classes, got 1"),
        ({"classes": ()}, "at least 2 different classes"),
        ({"classes": (1, 1)}, "at least 2 different classes, got 1, 1"),
        ({"classes": (0, 2), "directions": [(0, 1)]}, r"direction \(0, 1\) .* classes in 0, 2"),
        ({"classes": (0, 2), "class_names": ("a",)}, "3 classes, 2 of them chosen, but 1 names"),
    ],
)
def test_classes_that_cannot_be_chosen_are_a_clear_error(options, message):
    with pytest.raises(InputError, match=message):
        measure(**options)


# Interrupted measurements.


def test_an_interrupted_measurement_goes_on_and_equals_an_uninterrupted_one(tmp_path, matrix):
    interrupted = RecordedProgress(interrupt_after=4)
    with pytest.raises(StoppedError):
        measure(resume_dir=tmp_path, progress=interrupted)
    chunks = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(chunks) == 2
    again = RecordedProgress()
    resumed = measure(resume_dir=tmp_path, progress=again)
    assert again.skipped == [4]
    assert again.advanced == [2]
    assert_same_matrix(resumed, matrix)
    assert chunks.items() <= {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}.items()
    finished = RecordedProgress()
    assert_same_matrix(measure(resume_dir=tmp_path, progress=finished), matrix)
    assert finished.advanced == []
    assert finished.figures == pytest.approx(again.figures)


def test_an_interrupted_measurement_goes_on_with_chunks_of_another_size(tmp_path, matrix):
    interrupted = RecordedProgress(interrupt_after=3)
    with pytest.raises(StoppedError):
        measure(resume_dir=tmp_path, progress=interrupted)
    again = RecordedProgress()
    resumed = measure(resume_dir=tmp_path, progress=again, directions_per_chunk=1)
    assert again.skipped == [4]
    assert again.advanced == [1, 1]
    np.testing.assert_allclose(resumed.values, matrix.values, rtol=1e-4)


@pytest.fixture
def instant(monkeypatch):
    """Inversions that take no time: every direction gets a trigger of size 1."""

    def invert(logits_fn, variables, samples, victims, seeds, **options):
        images = samples.images
        batch = (len(victims), len(seeds))
        mask = np.zeros((*batch, *images.shape[2:4], 1), np.float32)
        mask[..., 0, 0, 0] = 1
        return InversionResult(
            trigger=Trigger(mask, np.zeros((*batch, *images.shape[2:]), np.float32)),
            size=np.ones(batch, np.float32),
            success_rate=np.ones(batch, np.float32),
            losses_before=np.ones((*batch, images.shape[1])),
            losses_after=np.zeros((*batch, images.shape[1])),
        )

    monkeypatch.setattr(chunks, "invert_with_seeds", invert)
    monkeypatch.setattr(chunks, "chunk_bytes", lambda *inputs, **options: 0)


@pytest.mark.parametrize(
    "changed",
    [
        {"num_steps": 4},
        {"mask_weight": 0.5},
        {"seeds": (1,)},
        {"minibatch_size": 8},
        {"num_images": 5},
        {"images": row_images(LABELS, seed=1)},
        {"labels": np.roll(LABELS, 4)},
        {"variables": row_variables(scale=2.0)},
        {"inversion": NeuralCleanse(patience=4, verify_every=5)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_chunks_of_another_measurement_are_not_taken_for_this_one(tmp_path, changed, instant):
    options = {"num_steps": 2, "directions": [(0, 1), (1, 0)], "resume_dir": tmp_path}
    measure(**options)
    progress = RecordedProgress()
    measure(**{**options, **changed}, progress=progress)
    assert progress.skipped == []
    assert progress.advanced == [2]


def test_chunks_of_another_function_are_not_taken_for_this_one(tmp_path, instant):
    def model(scale):
        return lambda images: CLASSIFIER.predict(row_variables(scale=scale), images)

    options = {"num_steps": 1, "directions": [(0, 1)], "resume_dir": tmp_path}
    for scale in (2.0, 4.0):
        progress = RecordedProgress()
        measure_function(model(scale), **options, progress=progress)
        assert progress.skipped == []


def test_a_function_that_has_changed_is_measured_as_it_is_now(instant):
    model = {"variables": VARIABLES}

    def logits_fn(images):
        return CLASSIFIER.predict(model["variables"], images)

    assert measure_function(logits_fn).num_measured() == 6
    model["variables"] = nan_weights()
    with pytest.raises(InputError, match="NaN or infinite logits"):
        measure_function(logits_fn)


def test_a_resumed_measurement_says_what_is_done(tmp_path, instant):
    measure(directions=[(0, 1), (0, 2)], resume_dir=tmp_path)
    stream = io.StringIO()
    measure(resume_dir=tmp_path, progress=console_progress(stream))
    assert "distances: 2 of 6 directions done, continuing" in stream.getvalue()
    assert "distances: 6/6 directions, 100 %" in stream.getvalue()


# Input that cannot be measured.


def nan_weights():
    variables = row_variables()
    variables["params"]["kernel"] = variables["params"]["kernel"].at[5, 1].set(jnp.nan)
    return variables


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 255 * IMAGES}, r"images must be in \[0, 1\].*0-255 pixels"),
        ({"images": IMAGES[0]}, r"must have shape \[n, h, w, c\]"),
        ({"variables": nan_weights()}, "NaN or infinite logits for 24 of 24 images.*weights"),
        ({"labels": LABELS + 1}, "counted from 1"),
        ({"labels": LABELS[:-1]}, "24 images but 23 labels|23 for 24 images"),
        ({"labels": np.where(LABELS == 2, 1, LABELS)}, "no images of 1 victim classes: 2"),
        ({"class_names": ("a", "b")}, "has 3 classes, but 2 names"),
        ({"directions": [(0, 0)]}, r"direction \(0, 0\) needs two different classes in 0\.\.2"),
        ({"directions": [(0, 3)]}, r"direction \(0, 3\) needs two different classes in 0\.\.2"),
    ],
)
def test_input_that_cannot_be_measured_is_a_clear_error(options, message):
    with pytest.raises(InputError, match=message):
        measure(**options)


@pytest.mark.parametrize(
    ("logits_fn", "message"),
    [
        (lambda x: jax.nn.softmax(x.mean((2, 3))), "returns probabilities"),
        (lambda x: x.mean((1, 2)), "at least 2 classes, the model has 1"),
        (lambda x: x.mean((1, 2, 3)), r"must return logits \[n, K\].*returned \(8,\)"),
        (lambda x: jnp.zeros((1, 3)), r"must return logits \[n, K\].*returned \(1, 3\)"),
        (lambda x: x / 0, "must return logits|NaN or infinite"),
    ],
    ids=["probabilities", "one class", "no class axis", "no batch axis", "images"],
)
def test_a_function_that_is_no_classifier_is_a_clear_error(logits_fn, message):
    with pytest.raises(InputError, match=message):
        measure_function(logits_fn, num_steps=1)


def small_logits(images):
    """Logits of three classes that look like probabilities where an image is dark."""
    level = images.mean((1, 2, 3))
    return jnp.stack([level, 2 * level, 1 - 3 * level + jnp.maximum(level - 0.2, 0)], axis=1)


@pytest.mark.parametrize("num_images", [1, 2])
def test_logits_that_happen_to_sum_to_one_on_a_few_images_are_logits(num_images):
    images = np.full((num_images, 4, 4, 1), 0.1, np.float32)
    logits = np.asarray(small_logits(images))
    assert logits.min() >= 0
    np.testing.assert_allclose(logits.sum(1), 1, rtol=1e-6)
    labels, options = np.zeros(num_images, np.int32), {"directions": [(0, 1)], "num_steps": 1}
    assert measure_function(small_logits, images, labels, **options).num_measured() == 1


@pytest.mark.parametrize("num_images", [1, 24])
def test_probabilities_are_refused_however_few_images_there_are(num_images):
    with pytest.raises(InputError, match="returns probabilities"):
        distance.class_distance(
            lambda x: jax.nn.softmax(CLASSIFIER.predict(VARIABLES, x)), IMAGES[:num_images], 1
        )


@pytest.mark.parametrize(
    "options",
    [
        {"num_steps": 0},
        {"num_images": 0},
        {"minibatch_size": 0},
        {"mask_weight": -1.0},
        {"seeds": ()},
        {"directions": []},
        {"directions_per_chunk": -1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        measure(**options)


def test_numbers_of_numpy_in_a_budget_can_be_saved(tmp_path):
    budget = {"num_images": np.int64(4), "num_steps": np.int32(3), "minibatch_size": np.int16(4)}
    plain = {name: int(value) for name, value in budget.items()}
    given = measure(**budget, mask_weight=np.float32(0.25), directions=[(0, 1)])
    given.save(tmp_path / "matrix.npz")
    loaded = distance.DistanceMatrix.load(tmp_path / "matrix.npz")
    same = measure(**plain, mask_weight=0.25, directions=[(0, 1)])
    for name in (*budget, "mask_weight"):
        assert loaded.details[name] == same.details[name]
    np.testing.assert_array_equal(loaded.values, same.values)


def test_an_inversion_can_be_named():
    options = {"num_steps": 5, "directions": [(0, 1)]}
    named = measure(inversion="neural_cleanse", **options)
    np.testing.assert_array_equal(
        named.values, measure(inversion=NeuralCleanse(), **options).values
    )
    with pytest.raises(InputError, match="unknown inversion 'guess'"):
        measure(inversion="guess", **options)


def test_a_missing_class_is_no_fault_where_it_is_not_a_victim(matrix):
    kept = LABELS != 2
    some = measure(IMAGES[kept], LABELS[kept], directions=[(0, 2), (1, 2)])
    assert some.values[0, 2] == matrix.values[0, 2]


def test_uint8_images_are_measured_as_the_same_images_in_the_unit_interval():
    stored = np.round(IMAGES * 255).astype(np.uint8)
    options = {"num_steps": 10, "directions": [(0, 1), (1, 0)]}
    from_bytes = measure(stored, **options)
    from_floats = measure(stored.astype(np.float32) / np.float32(255), **options)
    np.testing.assert_array_equal(from_bytes.values, from_floats.values)


# One direction.


@pytest.mark.parametrize("target", [-1, 3])
def test_a_target_out_of_range_is_an_error(target):
    with pytest.raises(InputError, match=rf"target must be in 0\.\.2, got {target}"):
        distance.class_distance(rows, IMAGES, target, variables=VARIABLES)


def test_a_class_distance_refuses_a_budget_that_makes_no_sense():
    for name in ("num_steps", "minibatch_size", "mask_weight"):
        with pytest.raises(InputError, match=name):
            distance.class_distance(rows, IMAGES, 1, variables=VARIABLES, **{name: -1})


def test_a_model_that_was_measured_is_not_kept():
    class Model:
        def __call__(self, images):
            return CLASSIFIER.predict(VARIABLES, images)

    model = Model()
    held = weakref.ref(model)
    distance.class_distance(model, IMAGES[:8], 1, num_steps=1)
    del model
    jax.clear_caches()
    gc.collect()
    assert held() is None


def test_a_class_distance_belongs_to_a_trigger_that_reaches_the_bound_and_is_compiled_once():
    victims = IMAGES[:8]
    traces = []
    for target in (1, 2):
        result = distance.class_distance(rows, victims, target, variables=VARIABLES, num_steps=50)
        traces.append(len(TRACES))
        rate = numpy_success_rate(
            lambda x: CLASSIFIER.predict(VARIABLES, x), victims, result.trigger, target
        )
        assert 0.9 <= rate == pytest.approx(float(result.success_rate))
        assert float(result.size) == pytest.approx(float(np.sum(result.trigger.mask)), rel=1e-5)
    assert traces[0] == traces[1]


@pytest.mark.parametrize("seeds", [3, None, "0", (-1,), (), (0.5,), ((0,), (1,))])
def test_seeds_that_are_none_are_refused(seeds):
    with pytest.raises(InputError, match=r"^seeds must be .*whole numbers.*, such as \(0,\), got"):
        check_seeds(seeds)
