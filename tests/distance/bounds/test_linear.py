"""The optimum of linear classifiers against figures that were found otherwise."""

import numpy as np
import pytest

from moth_jax.distance import certified_distances, distance_matrix

# Direction: what is proven and what was found for 90 % of the images, and for all of them.
FIGURES = {(2, 3): (3.00, 3.02, 4.53), (3, 2): (2.86, 2.87, 3.53), (7, 1): (3.57, 3.58, 5.11)}


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    data = load_digits()
    images = np.float32(data.images[..., None] / 16)
    model = LogisticRegression(max_iter=1000).fit(images.reshape(-1, 64), data.target)
    weights, bias = np.float32(model.coef_.T), np.float32(model.intercept_[None])
    return lambda x: x.reshape(len(x), -1) @ weights + bias, images, data.target


@pytest.mark.parametrize("direction", FIGURES)
def test_all_images_of_the_digits_take_the_trigger_of_the_linear_program(digits, direction):
    lower = certified_distances(*digits, directions=[direction], success_bound=1.0, progress=False)[
        direction
    ]
    assert lower == pytest.approx(FIGURES[direction][2], rel=0.01)


def test_most_images_of_the_digits_take_no_less_than_is_proven(digits):
    lower = certified_distances(*digits, directions=[(3, 2), (7, 1)], progress=False)
    for direction in [(3, 2), (7, 1)]:
        proven, found, _ = FIGURES[direction]
        assert proven * 0.99 <= lower[direction] <= found * 1.01


@pytest.mark.slow
def test_no_bound_of_the_digits_is_above_a_verified_trigger(digits):
    directions = [(0, 9), (9, 8), (2, 3)]
    matrix = distance_matrix(*digits, directions=directions, progress=False)
    lower = certified_distances(*digits, directions=directions, progress=False)
    for direction in directions:
        assert lower[direction] <= matrix.values[direction]
        assert lower[direction] > 0.7 * matrix.values[direction]
