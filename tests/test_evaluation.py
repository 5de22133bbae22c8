import dataclasses

import jax
import numpy as np
import pytest

from moth_jax.data.dataset import ImageSplit
from moth_jax.evaluation import Adversary, accuracy, pgd, pgd_accuracy, predictions
from tests.helpers.toys import linear_classifier, row_images, row_split, row_variables

PREDICT = linear_classifier().predict
VARIABLES = row_variables()
SPLIT = row_split([5, 6, 6])


def numpy_logits(images):
    return images.reshape(len(images), -1) @ np.asarray(VARIABLES["params"]["kernel"])


@pytest.mark.parametrize("batch_size", [1, 4, 17, 64])
def test_predictions_are_those_of_numpy_whatever_the_batch(batch_size):
    images = np.random.default_rng(0).random((17, 4, 4, 1)).astype(np.float32)
    split = ImageSplit(images, SPLIT.labels)
    predicted = predictions(PREDICT, VARIABLES, split, batch_size=batch_size)
    np.testing.assert_array_equal(predicted, numpy_logits(images).argmax(1))
    assert len(set(predicted.tolist())) == 3


def test_accuracy_is_the_share_that_is_classified_as_labelled():
    labels = SPLIT.labels.copy()
    labels[-3:] = (labels[-3:] + 1) % 3
    wrong = dataclasses.replace(SPLIT, labels=labels)
    assert accuracy(PREDICT, VARIABLES, SPLIT, batch_size=8) == 1
    assert accuracy(PREDICT, VARIABLES, wrong, batch_size=8) == pytest.approx(14 / 17)


attack = jax.jit(pgd, static_argnames=("logits_fn", "adversary"))


def perturbed(epsilon, step_size=0.02, num_steps=8, seed=0):
    """The images of `SPLIT` under attack."""
    given = PREDICT, VARIABLES, SPLIT.images, SPLIT.labels, jax.random.key(seed)
    return np.asarray(attack(*given, adversary=Adversary(epsilon, step_size, num_steps)))


@pytest.mark.parametrize("epsilon", [0.02, 0.1, 0.5])
def test_an_attack_stays_within_epsilon_and_the_unit_interval(epsilon):
    moved = perturbed(epsilon)
    assert np.abs(moved - SPLIT.images).max() <= epsilon + 1e-6
    assert moved.min() >= 0
    assert moved.max() <= 1


def test_an_attack_on_a_linear_model_ends_in_the_corner_that_is_known():
    moved = perturbed(0.1, step_size=0.05)
    for image, before, label in zip(moved, SPLIT.images, SPLIT.labels, strict=True):
        # Row k speaks for class k: the label's row is darkened, those of the others brightened.
        for row in range(3):
            corner = before[row] + (-0.1 if row == label else 0.1)
            np.testing.assert_allclose(image[row], np.clip(corner, 0, 1), atol=1e-6)


def test_an_attack_starts_at_random():
    starts = [perturbed(0.1, num_steps=0, seed=seed) for seed in (0, 1)]
    assert np.abs(starts[0] - starts[1]).max() > 0.1
    moved = starts[0] - SPLIT.images
    assert np.abs(moved).max() <= 0.1 + 1e-6
    assert moved.min() < -0.09
    assert moved.max() > 0.09


def test_robustness_is_measured_on_the_whole_split():
    # The first images are classified with certainty, the last three lie near the boundary.
    images = row_images(SPLIT.labels)
    for i in (14, 15, 16):
        images[i] = 0.45
        images[i, SPLIT.labels[i]] = 0.5
    split = ImageSplit(images, SPLIT.labels)
    robust = pgd_accuracy(
        PREDICT, VARIABLES, split, adversary=Adversary(0.1, 0.05, 6), batch_size=8
    )
    assert accuracy(PREDICT, VARIABLES, split, batch_size=8) == 1
    assert robust == pytest.approx(14 / 17)


def test_a_batch_larger_than_the_split_counts_every_image_once():
    for epsilon, robust in ((0.0, 1), (1.0, 0)):
        adversary = Adversary(epsilon, epsilon / 2, 6)
        given = PREDICT, VARIABLES, SPLIT
        assert pgd_accuracy(*given, adversary=adversary, batch_size=64) == robust
