"""Random flips and shifts, on the device."""

import jax
import jax.numpy as jnp

from moth_jax.errors import InputError, require_choice


def augment(images, key, *, flip: bool, shift: int, fill: str = "edge"):
    """Mirror and move each image at random.

    Each image is mirrored left to right with probability 1/2 (if `flip`), then moved by a whole
    number of pixels drawn uniformly from [-shift, shift], separately along each axis. Pure; `flip`,
    `shift` and `fill` must be static under `jax.jit`.

    Args:
      images: [n, h, w, c] of any type.
      key: a JAX random key.
      flip: whether to mirror.
      shift: largest move in pixels, in [0, min(h, w)); 0 moves nothing.
      fill: what comes in at the border: "edge" repeats the border pixel, "zero" is black.

    Returns:
      Images of the same shape and type; the very `images` if there is nothing to do.

    Note:
      The authors' code hardens CIFAR-10 with Keras's `ImageDataGenerator`, shifts of up to 12.5 %
      (real-valued, interpolated) filled with zeros. Shifts here are whole pixels: `shift=4,
      fill="zero"` is the nearest to it.

    Example:
      >>> images = jnp.arange(4.0).reshape(1, 1, 4, 1)
      >>> augment(images, jax.random.key(0), flip=False, shift=0) is images
      True
    """
    n, height, width, _ = images.shape
    if not 0 <= shift < min(height, width):
        raise InputError(
            f"shift must be in [0, {min(height, width)}) pixels for images of {height} x {width}, "
            f"got {shift}"
        )
    require_choice("fill", fill, ("edge", "zero"))
    if not flip and shift == 0:
        return images
    flip_key, row_key, column_key = jax.random.split(key, 3)
    rows, columns = jnp.arange(height)[None, :], jnp.arange(width)[None, :]
    if shift:
        rows = rows + jax.random.randint(row_key, [n, 1], -shift, shift + 1)
        columns = columns + jax.random.randint(column_key, [n, 1], -shift, shift + 1)
    inside_rows = (rows >= 0) & (rows < height)
    inside_columns = (columns >= 0) & (columns < width)
    rows, columns = jnp.clip(rows, 0, height - 1), jnp.clip(columns, 0, width - 1)
    if flip:
        mirrored = jax.random.bernoulli(flip_key, 0.5, [n, 1])
        columns = jnp.where(mirrored, width - 1 - columns, columns)
    # One gather does both: reading position (i, j) from (rows[i], columns[j]).
    moved = images[jnp.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    if fill == "zero" and shift:
        inside = inside_rows[:, :, None, None] & inside_columns[:, None, :, None]
        moved = jnp.where(inside, moved, jnp.zeros([], images.dtype))
    return moved
