import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moth_jax.data.augmentation import augment
from moth_jax.errors import InputError

# Distinct values, so that an output tells where each of its pixels came from.
IMAGES = np.arange(6 * 5 * 7 * 2, dtype=np.float32).reshape(6, 5, 7, 2) + 1


def reference_moves(image, *, flip, shift, fill):
    """Every (mirrored, dy, dx) and the image it gives, one pixel at a time."""
    height, width, _ = image.shape
    moves = {}
    for mirrored in (False, True) if flip else (False,):
        for dy in range(-shift, shift + 1):
            for dx in range(-shift, shift + 1):
                source = image[:, ::-1] if mirrored else image
                moved = np.zeros_like(image)
                for i in range(height):
                    for j in range(width):
                        y, x = i + dy, j + dx
                        outside = not (0 <= y < height and 0 <= x < width)
                        if outside and fill == "zero":
                            continue
                        moved[i, j] = source[min(max(y, 0), height - 1), min(max(x, 0), width - 1)]
                moves[mirrored, dy, dx] = moved
    return moves


def move_of(image, augmented, **options):
    moves = reference_moves(image, **options)
    found = [move for move, moved in moves.items() if (moved == augmented).all()]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("fill", ["edge", "zero"])
@pytest.mark.parametrize(("flip", "shift"), [(True, 0), (False, 2), (True, 2)])
def test_each_image_is_one_of_the_moves_of_a_plain_loop(flip, shift, fill):
    augmented = augment(IMAGES, jax.random.key(0), flip=flip, shift=shift, fill=fill)
    assert augmented.shape == IMAGES.shape
    for image, result in zip(IMAGES, np.asarray(augmented), strict=True):
        move_of(image, result, flip=flip, shift=shift, fill=fill)


def test_all_moves_occur_about_equally_often_and_differ_between_images():
    image = IMAGES[:1, :3, :3, :1]
    batch = jnp.asarray(np.repeat(image, 1800, 0))
    augmented = np.asarray(augment(batch, jax.random.key(1), flip=True, shift=1))
    values, counts = np.unique(augmented, axis=0, return_counts=True)
    assert len(values) == 18
    assert counts.min() > 60
    assert counts.max() < 145
    assert {move_of(image[0], v, flip=True, shift=1, fill="edge") for v in values} == {
        (m, dy, dx) for m in (False, True) for dy in (-1, 0, 1) for dx in (-1, 0, 1)
    }


def test_nothing_is_done_when_both_are_off():
    images = jnp.asarray(IMAGES)
    assert augment(images, jax.random.key(0), flip=False, shift=0) is images


def test_compiled_and_not_compiled_agree_and_the_type_is_kept():
    compiled = jax.jit(augment, static_argnames=("flip", "shift", "fill"))
    for dtype in (np.uint8, np.float32):
        images = jnp.asarray(IMAGES % 256, dtype)
        options = {"flip": True, "shift": 2, "fill": "zero"}
        with jax.numpy_dtype_promotion("strict"):
            expected = augment(images, jax.random.key(3), **options)
        assert expected.dtype == dtype
        np.testing.assert_array_equal(compiled(images, jax.random.key(3), **options), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": -1}, r"shift must be in \[0, 5\) pixels for images of 5 x 7, got -1"),
        ({"shift": 5}, "got 5"),
        ({"shift": 1, "fill": "mean"}, "unknown fill 'mean'; choose one of: edge, zero"),
    ],
)
def test_impossible_augmentations_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        augment(IMAGES, jax.random.key(0), flip=False, **options)
