"""Labels in another order, outputs that are no logits or not finite, losses that are not."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from sklearn.datasets import load_digits

from moth_jax import distance, outputs
from moth_jax.data.checks import check_images
from moth_jax.data.dataset import ImageSplit
from moth_jax.distance.nearest import nearest_directions
from moth_jax.errors import InputError
from moth_jax.evaluation import Adversary, accuracy, pgd_accuracy
from moth_jax.hardening import METHODS
from moth_jax.hardening.baselines.fine_tuning import FineTuningConfig
from moth_jax.scanning import SCANNERS, ScanOptions, scan
from moth_jax.training import TrainingConfig, train
from tests.helpers.toys import linear_classifier, row_dataset, row_images, row_variables

CLASSIFIER, VARIABLES = linear_classifier(), row_variables()
LABELS = np.repeat([0, 1, 2], 8).astype(np.int32)
IMAGES = row_images(LABELS)
SHIFTED = (LABELS + 1) % 3
FEW_STEPS = ScanOptions(num_steps=5, num_rounds=1)
HARDENING = FineTuningConfig(max_steps=2, batch_size=8, batch_norm="frozen")


def measure(logits_fn=CLASSIFIER.predict, images=IMAGES, labels=LABELS, **options):
    options = {"num_steps": 5, "progress": False, "variables": VARIABLES, **options}
    return distance.distance_matrix(logits_fn, images, labels, **options)


def harden(classifier=CLASSIFIER, data=(IMAGES, LABELS), **options):
    config = dataclasses.replace(HARDENING, **options)
    return METHODS["fine_tuning"].harden(classifier, VARIABLES, data, config, progress=False)


def scan_by(method, logits_fn=CLASSIFIER.predict, labels=LABELS, **options):
    given = {"method": method, "options": FEW_STEPS, "progress": False, **options}
    return scan(logits_fn, IMAGES, labels, variables=VARIABLES, **given)


# Labels in another order than the outputs.

IN_EVERY_FUNCTION = [
    measure,
    lambda **given: harden(data=(IMAGES, given["labels"])),
    lambda **given: nearest_directions(
        CLASSIFIER.predict, IMAGES, given["labels"], 2, variables=VARIABLES, progress=False
    ),
    *(lambda method=method, **given: scan_by(method, **given) for method in SCANNERS),
]


@pytest.mark.parametrize("function", IN_EVERY_FUNCTION)
def test_shifted_labels_are_refused_everywhere_with_the_order_that_explains(function):
    with pytest.raises(InputError, match=r"0 % of the images.*100 % in another order") as fault:
        function(labels=SHIFTED)
    order = np.array([2, 0, 1])
    assert f"numpy.array({order.tolist()})[labels]" in str(fault.value)
    np.testing.assert_array_equal(order[SHIFTED], LABELS)


def test_two_classes_that_changed_places_are_refused_and_named():
    swapped = np.array([1, 0, 2])[LABELS]
    with pytest.raises(InputError, match=r"'cat' \(0\) as 'dog' \(1\), 'dog' \(1\) as 'cat'"):
        measure(labels=swapped, class_names=("cat", "dog", "cow"))


def test_an_option_takes_the_labels_as_they_are():
    with pytest.warns(UserWarning, match="predicted without a trigger.*no sign of a backdoor"):
        matrix = measure(labels=SHIFTED, check_order=False)
    assert matrix.is_there().sum() == 3
    assert matrix.values[0, 2] == 0
    assert harden(data=(IMAGES, SHIFTED), check_order=False).step == 2


def drawn(confusion, per_class, seed=0):
    """Predictions and labels: `confusion` [K, K] is the chance of each prediction."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(confusion)), per_class)
    return np.array([rng.choice(len(row), p=row) for row in confusion[labels]]), labels


def right(num_classes, share):
    """A confusion: `share` are right, the others anything."""
    rest = (1 - share) / num_classes
    return share * np.eye(num_classes) + rest * np.ones((num_classes, num_classes))


HONEST = {
    "well trained": drawn(right(10, 0.9), 20),
    "badly trained": drawn(right(10, 0.3), 20),
    "guessing": drawn(right(10, 0.0), 20),
    "guessing from an image a class": drawn(right(50, 0.0), 1),
    "constant": (np.zeros(200, int), np.repeat(np.arange(10), 20)),
    "all of two classes": (np.repeat(np.arange(10), 20) % 2, np.repeat(np.arange(10), 20)),
    "of few victims": (np.array([3] * 15 + [5] * 25), np.repeat([3, 5], 20)),
    "imbalanced": (np.array([0] * 996 + [1] * 4), np.repeat([0, 1, 2], [990, 5, 5])),
    "twins taken for each other": drawn(np.array([[0.45, 0.55, 0], [0.6, 0.4, 0], [0, 0, 1]]), 50),
    "one class taken for another": (np.array([1] * 20 + [1] * 20), np.repeat([0, 1], 20)),
    "one image a class": (np.array([1, 0, 2]), np.arange(3)),
    "a few of many classes": (np.array([7] * 5 + [1] * 45), np.repeat([0, 1], [5, 45])),
}


@pytest.mark.parametrize("name", HONEST)
def test_models_that_are_bad_or_constant_are_no_other_order(name):
    predicted, labels = HONEST[name]
    outputs.check_order(predicted, labels, 50, {})


def untrained(kind, num_classes, rng):
    """Predictions of the digits of some classes by a model with random weights, and labels."""
    pixels, digits = load_digits(return_X_y=True)
    classes = rng.choice(10, num_classes, replace=False)
    rows = np.concatenate([np.flatnonzero(digits == k)[:100] for k in classes])
    values = pixels / 16 - 0.3
    if kind == "cnn":
        windows = sliding_window_view(values.reshape(-1, 8, 8), (3, 3), axis=(1, 2))
        values = np.maximum(windows.reshape(len(pixels), 36, 9) @ rng.normal(size=(9, 16)), 0)
        values = values.mean(1)
        values = (values - values.mean(0)) / values.std(0)  # as a batch norm does
    logits = values[rows] @ rng.normal(size=(values.shape[1], num_classes))
    labels = np.repeat(np.arange(num_classes), [min(100, sum(digits == k)) for k in classes])
    return logits.argmax(1), labels


@pytest.mark.parametrize("num_classes", [2, 3, 5])
@pytest.mark.parametrize("kind", ["linear", "cnn"])
def test_models_that_have_learnt_nothing_are_rarely_taken_for_another_order(kind, num_classes):
    rng, refused = np.random.default_rng(0), 0
    for _ in range(100):
        try:
            outputs.check_order(*untrained(kind, num_classes, rng), num_classes, {})
        except InputError:
            refused += 1
    assert refused <= 1


def test_two_classes_that_changed_places_are_found_if_the_model_is_good():
    predicted, labels = drawn(right(2, 0.96), 50)
    with pytest.raises(InputError, match="do not match"):
        outputs.check_order(predicted, 1 - labels, 2, {})


@pytest.mark.parametrize("num_classes", [2, 3])
def test_random_models_are_no_other_order(num_classes):
    """They predict the images of one class alike, and a few classes in any order."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(num_classes), 100)

    def is_refused():
        centres = 0.7 * rng.normal(size=(num_classes, 64))
        images = centres[labels] + rng.normal(size=(len(labels), 64))
        predicted = (images @ rng.normal(size=(64, num_classes))).argmax(1)
        try:
            outputs.check_order(predicted, labels, num_classes, {})
        except InputError:
            return True
        return False

    assert sum(is_refused() for _ in range(200)) <= 1


@pytest.mark.parametrize(
    ("num_classes", "present", "per_class"), [(10, 10, 5), (11, 11, 20), (43, 5, 20), (200, 200, 4)]
)
def test_another_order_is_found_with_few_images_and_few_of_the_classes(
    num_classes, present, per_class
):
    predicted, labels = drawn(right(num_classes, 0.85)[:present], per_class)
    order = np.argsort([str(k) for k in range(num_classes)])
    order = order if (order[:present] != np.arange(present)).all() else np.roll(order, 1)
    position = np.argsort(order)
    with pytest.raises(InputError, match="labels and outputs do not match"):
        outputs.check_order(predicted, position[labels], num_classes, {})


def test_numbered_folders_in_the_order_of_text_are_refused():
    predicted, numbers = drawn(right(11, 0.95), 30)
    as_text = np.argsort(np.argsort([str(k) for k in range(11)]))  # 0, 1, 10, 2, ...
    with pytest.raises(InputError, match="do not match") as fault:
        outputs.check_order(predicted, as_text[numbers], 11, {})
    assert "numpy.array([0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9])[labels]" in str(fault.value)


@pytest.mark.parametrize("method", SCANNERS)
def test_victims_that_are_predicted_as_the_target_are_no_evidence(method):
    def always(variables, images):
        return 0 * images.mean((2, 3))[:, :3] + np.float32([[0, 0, 5]])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = scan_by(method, always)
    assert found.poisoned is not True
    there = [arm for arm in found.arms if arm.there]
    assert {arm.target for arm in there} == {"2"}
    assert np.isnan([arm.suspicion for arm in there]).all()
    assert "as '2' without any trigger, which is no evidence of a backdoor" in found.describe()


def test_a_distance_of_images_of_the_target_is_warned_of():
    with pytest.warns(UserWarning, match="100 % of the images are predicted as 0 without"):
        distance.class_distance(CLASSIFIER.predict, IMAGES[:8], 0, variables=VARIABLES, num_steps=5)


# Outputs that are not finite.


def nan_for_some(variables, images):
    """NaN for the images whose first pixel is white."""
    logits = CLASSIFIER.predict(variables, images)
    return jnp.where(images[:, 0, 0] == 1, jnp.nan, logits)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_images_whose_logits_are_not_finite_are_named_everywhere(value):
    images = IMAGES.copy()
    images[[11, 20], 0, 0] = 1

    def model(variables, images):
        logits = CLASSIFIER.predict(variables, images)
        return jnp.where(images[:, 0, 0] == 1, value, logits)

    named = r"for 2 of 24 images, at index 11, 20"
    split = ImageSplit(images, LABELS)
    for function in (
        lambda: measure(model, images),
        lambda: distance.class_distance(model, images, 1, variables=VARIABLES),
        lambda: scan(model, images, LABELS, variables=VARIABLES, progress=False),
        lambda: accuracy(model, VARIABLES, split),
        lambda: pgd_accuracy(model, VARIABLES, split, adversary=Adversary(0.1)),
    ):
        with pytest.raises(InputError, match=named):
            function()


def test_a_loss_that_is_not_finite_stops_hardening_with_the_step_and_the_images():
    dataset = row_dataset()
    images = dataset.train.images.copy()
    images[[3, 30], 0, 0] = 1
    dataset = dataclasses.replace(dataset, train=ImageSplit(images, dataset.train.labels))
    classifier = dataclasses.replace(CLASSIFIER, predict=nan_for_some)
    with pytest.raises(InputError, match=r"loss is nan at step \d+ of the hardening.*index 3, 30"):
        harden(classifier, dataset, max_steps=8, augment=False)


def test_a_loss_that_is_not_finite_stops_training_with_the_step():
    rates = {"learning_rate": 2e9, "weight_decay": 2e9}  # the weights grow by their product
    config = TrainingConfig(epochs=1, batch_size=8, batch_norm="frozen", **rates)
    with pytest.raises(InputError, match=r"at step \d of epoch 1.*diverged; lower its learning_r"):
        train(CLASSIFIER, VARIABLES, row_dataset(), config, progress=False)


# Outputs that are no logits.


@pytest.mark.parametrize(
    "last", [jax.nn.softmax, jax.nn.sigmoid, lambda x: 100 * jax.nn.softmax(x)]
)
def test_probabilities_are_refused_everywhere(last):
    def model(variables, images):
        return last(CLASSIFIER.predict(variables, images))

    split = ImageSplit(IMAGES, LABELS)
    for function in (
        lambda: measure(model),
        lambda: scan_by("k_arm", model),
        lambda: harden(dataclasses.replace(CLASSIFIER, predict=model)),
        lambda: accuracy(model, VARIABLES, split),
        lambda: pgd_accuracy(model, VARIABLES, split, adversary=Adversary(0.1)),
    ):
        with pytest.raises(InputError, match="returns probabilities"):
            function()


@pytest.mark.parametrize(
    "last", [jax.nn.log_softmax, lambda x: x / 40, lambda x: jax.nn.relu(x) / 50, lambda x: 0 * x]
)
def test_logits_that_lie_between_0_and_1_are_logits(last):
    def model(variables, images):
        return last(CLASSIFIER.predict(variables, images))

    assert accuracy(model, VARIABLES, (IMAGES, LABELS)) in (1.0, 1 / 3)


# Images that were divided twice.


@pytest.mark.parametrize("images", [IMAGES / 255, (IMAGES * 16).astype(np.uint8)])
def test_images_whose_white_is_far_from_1_are_warned_of(images):
    with pytest.warns(UserWarning, match="where white is 1: were they divided by 255 twice"):
        check_images(images)


def test_parts_that_were_divided_twice_are_warned_of():
    with pytest.warns(UserWarning, match=r"24 of 48 are at most.*first at index 24"):
        check_images(np.concatenate([IMAGES, IMAGES / 255]))


def test_dark_and_black_images_among_others_are_no_fault():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_images(np.concatenate([IMAGES, 0 * IMAGES[:9], IMAGES[:1] / 255]))
        check_images(0.3 * IMAGES)
        check_images(0 * IMAGES)


# Hardening plain arrays.


def test_plain_arrays_can_be_hardened_and_others_are_told_what_is_needed():
    assert harden(data=(jnp.asarray(IMAGES), LABELS.tolist())).step == 2
    for data, message in (
        ([IMAGES], r"a pair \(images, labels\).*got list"),
        (ImageSplit(IMAGES, LABELS).batches([[0]]), "a pair"),
        ((IMAGES[::8], LABELS[::8]), "3 images are too few"),
        ((IMAGES, LABELS + 1), r"in \[0, 3\)"),
    ):
        with pytest.raises(InputError, match=message):
            harden(data=data)


# What is no function, no option, no number.


class Module:
    """What stands for torch.nn.Module."""

    def __call__(self, images):
        return images.flatten(1)


Module.__module__ = "torch.nn.modules.module"


class Net(Module):
    """A user's model in PyTorch."""


@pytest.mark.parametrize("net", [Net(), Net().__call__])
def test_a_pytorch_model_is_told_how_to_become_one_of_jax_everywhere(net):
    split = ImageSplit(IMAGES, LABELS)
    for function in (
        lambda: measure(net),
        lambda: distance.class_distance(net, IMAGES, 1),
        lambda: nearest_directions(net, IMAGES, LABELS, 2, progress=False),
        *(lambda method=method: scan_by(method, net) for method in SCANNERS),
        lambda: accuracy(net, None, split),
        lambda: pgd_accuracy(net, None, split, adversary=Adversary(0.1)),
        lambda: harden(net),
    ):
        with pytest.raises(InputError, match=r"^[^\n]*got a \w+; turn the PyTorch .*from_torch$"):
            function()


def test_a_function_is_told_that_hardening_needs_a_classifier():
    with pytest.raises(InputError, match=r"must be a Classifier, .*from_function"):
        harden(CLASSIFIER.predict)
    with pytest.raises(InputError, match="give its predict"):
        accuracy(CLASSIFIER, VARIABLES, (IMAGES, LABELS))


NO_COUNTS = [0, -1, 2.5, "3", float("nan"), 10**30, True, (1,)]
WRONG = [
    *(
        (name, value)
        for name in ("num_images", "num_steps", "minibatch_size", "directions_per_chunk")
        for value in NO_COUNTS
    ),
    *(("mask_weight", value) for value in (-1, "0.1", float("inf"), True, (1,))),
    *(("seeds", value) for value in (3, "0", (), (-1,), (2.5,), (2**31,), (True,), [[0, 1]])),
    *(("classes", value) for value in (2, "01", (0, "1"), (0, 1.0), (0, 9), [[0, 1]])),
    *(("class_names", value) for value in (3, "abc")),
    *(("directions", value) for value in (1, "01", (0, 1), [(0, 1.5)], [(0, "1")], [(0,)], [])),
    *(("check_order", value) for value in (0, "no", None)),
    *(("inversion", value) for value in (0, "", ["trimmed"])),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_options_of_measuring_that_are_none_are_refused_by_name(name, value):
    with pytest.raises(InputError, match=rf"^(unknown )?{name}[^\n]*$"):
        measure(**{name: value})


@pytest.mark.parametrize("target", [1.0, "1", None, True, (1,), 3, -1])
def test_a_target_that_is_no_class_is_refused(target):
    with pytest.raises(InputError, match=r"^target must be"):
        distance.class_distance(CLASSIFIER.predict, IMAGES[:8], target, variables=VARIABLES)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("options", {"num_steps": 5}),
        ("options", None),
        *(("threshold", value) for value in ("3", (1,), float("nan"), True)),
        ("classes", 2),
        ("check_order", "no"),
    ],
)
def test_options_of_scanning_that_are_none_are_refused_by_name(name, value):
    with pytest.raises(InputError, match=f"^{name} must be"):
        scan_by("k_arm", **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("batch_size", value) for value in NO_COUNTS),
        *(("seed", value) for value in (-1, 0.5, 2**31, "0")),
        *(("classes", value) for value in (2, None, "01", (0, 1.5))),
        *(("adversary", value) for value in (0.1, None, "pgd")),
        *(("learning_rate", value) for value in (-1, 0, float("nan"), "1")),
    ],
)
def test_options_of_hardening_that_are_none_are_refused_by_name(name, value):
    with pytest.raises(InputError, match=f"^{name} must be"):
        harden(**{name: value})


def test_arrays_and_ranges_of_whole_numbers_are_whole_numbers():
    matrix = measure(
        num_images=np.int64(4),
        seeds=np.arange(2),
        classes=range(3),
        directions=np.array([[0, 1], [2, 0]]),
    )
    assert matrix.num_measured() == 2
    assert FineTuningConfig(classes=np.array([0, 2])).classes == (0, 2)
