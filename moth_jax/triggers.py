"""Static backdoor triggers: one mask and one pattern for every image (Definition III.1).

    x' = (1 - m) * x + m * p

Another kind is added to the image instead: x' = clip(x + δ, 0, 1).

Everything works in pixel space [0, 1], before the model's own normalisation, on any number of
leading axes: a trigger of either kind may be one trigger or a batch of them.

Two sizes say how large a trigger is. The mask that it needs, in aggregated pixels, is a class
distance: `trigger_size`, and `needed_mask` for a trigger that is added. The number of pixels that
it changes is `changed_pixels`, for both kinds.
"""

import dataclasses
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moth_jax.types import AnyArray, ImageShape


@flax.struct.dataclass
class Trigger:
    """A mask and a pattern, both in [0, 1].

    Attributes:
      mask: [*d, h, w, 1], how much of the pattern replaces each pixel; shared by the channels.
      pattern: [*d, h, w, c].
    """

    mask: AnyArray
    pattern: AnyArray

    @property
    def image_shape(self) -> ImageShape:
        """(h, w, c)."""
        return _image_shape(self.pattern)


@flax.struct.dataclass
class AddedTrigger:
    """What is added to every image, which is then clipped to [0, 1].

    Attributes:
      delta: [*d, h, w, c] in [-1, 1].
    """

    delta: AnyArray

    @property
    def image_shape(self) -> ImageShape:
        """(h, w, c)."""
        return _image_shape(self.delta)


AnyTrigger = Trigger | AddedTrigger
# The last axes of the arrays that a file has of a trigger, by name; "M" of them.
TRIGGER_LAYOUT = {
    "mask": ("f", ("M", "h", "w", 1)),
    "pattern": ("f", ("M", "h", "w", "c")),
    "delta": ("f", ("M", "h", "w", "c")),
}
_LEAST_CHANGE = 1 / 255 - 1e-6  # of a pixel that counts as changed; below it by roundings


def stamp(images: Array | np.ndarray, trigger: AnyTrigger) -> Array:
    """Return `images` [..., h, w, c] with `trigger` applied.

    Pixels where the mask, or what is added, is 0 are kept.

    >>> trigger = Trigger(mask=jnp.ones((2, 2, 1)), pattern=jnp.full((2, 2, 3), 0.5))
    >>> float(stamp(jnp.zeros((4, 2, 2, 3)), trigger).mean())
    0.5
    >>> float(stamp(jnp.full((4, 2, 2, 3), 0.9), AddedTrigger(jnp.full((2, 2, 3), 0.5))).mean())
    1.0
    """
    if isinstance(trigger, AddedTrigger):
        return clip_to_unit(jnp.add(images, jax.lax.broadcast_to_rank(trigger.delta, images.ndim)))
    mask, pattern = (
        jax.lax.broadcast_to_rank(part, images.ndim) for part in (trigger.mask, trigger.pattern)
    )
    return (1 - mask) * images + mask * pattern


def clip_to_unit(values: Array) -> Array:
    """Return `values` clipped to [0, 1]; at exactly 0 and 1 the gradient is that of the inside.

    `jnp.clip` halves it there. Many pixels of images are exactly 0 or 1.
    """
    inside = (values >= 0) & (values <= 1)
    return jnp.where(inside, values, jax.lax.stop_gradient(jnp.clip(values, 0.0, 1.0)))


def trigger_size(trigger: Trigger) -> Array:
    """Return the size [*d] of a trigger: its mask summed over height, width and channels.

    This is the paper's unit, "aggregated pixels in the R, G and B channels": a mask of ones on a
    3x3 patch of an RGB image has size 27.

    >>> float(trigger_size(Trigger(mask=jnp.ones((3, 3, 1)), pattern=jnp.zeros((3, 3, 3)))))
    27.0
    """
    return trigger.pattern.shape[-1] * jnp.sum(trigger.mask, axis=(-3, -2, -1))


def replacing(trigger: AddedTrigger, image: AnyArray) -> Trigger:
    """Return the trigger with the smallest mask that stamps `image` [h, w, c] as `trigger` does.

    On other images the two differ. With the mean of some images it is a start for an inversion of
    masks and patterns. `image` may have leading axes, which then are the result's.

    >>> trigger = AddedTrigger(jnp.full((1, 1, 2), 0.2))
    >>> round(replacing(trigger, jnp.asarray([[[0.5, 0.6]]])).mask.item(), 3)  # 0.2 / (1 - 0.6)
    0.5
    """
    delta = jnp.broadcast_to(trigger.delta, jnp.broadcast_shapes(trigger.delta.shape, image.shape))
    room = jnp.where(delta > 0, 1 - image, image)
    share = jnp.where(room > 0, jnp.minimum(jnp.abs(delta) / jnp.where(room > 0, room, 1), 1), 0)
    mask = jnp.max(share, axis=-1, keepdims=True)
    change = jnp.clip(delta, -image, 1 - image)
    moved = image + change / jnp.where(mask > 0, mask, 1)
    return Trigger(mask=mask, pattern=jnp.clip(moved, 0.0, 1.0))


def needed_mask(
    trigger: AddedTrigger, images: AnyArray, weights: AnyArray, sent: AnyArray, share: float
) -> Array:
    """Return the mask [h, w, 1] under which `trigger` holds, as if it replaced pixels.

    With it, and a pattern of each image's own, every image that it has to hold for is stamped as
    by `trigger`: its change clip(x + δ, 0, 1) - x lies in m·[-x, 1 - x]. No smaller mask does so.
    The images are those that are sent to the target, less the ones that need the largest masks
    by themselves, as many as are not needed to reach the success bound.

    Args:
      trigger: one trigger.
      images: [n, h, w, c].
      weights: [n], 1 for an image, 0 for padding.
      sent: [n], 1 where the stamped image is taken for the target.
      share: the least share of the images that has to be sent.

    Note: It is the size of the trigger in the unit of a mask's, and not of a mask trigger that was
      found: that has one pattern for all images. Leaving out other images of those that are
      sent might give a smaller mask.
    """
    masks = replacing(trigger, images).mask
    counts = (jnp.asarray(sent) > 0) & (jnp.asarray(weights) > 0)
    own = jnp.where(counts, jnp.sum(masks, axis=(-3, -2, -1)), jnp.inf)
    wanted = jnp.ceil(share * jnp.sum(weights)).astype(jnp.int32)
    largest = jnp.sort(own)[jnp.maximum(wanted, 1) - 1]
    held = counts & (own <= largest)
    return jnp.max(jnp.where(held[:, None, None, None], masks, 0.0), axis=0)


def changed_pixels(trigger: AnyTrigger, images: AnyArray, weights: AnyArray) -> Array:
    """Return how many pixels (of h·w) `trigger` changes in any of `images` [n, h, w, c].

    A pixel is changed if one of its channels changes by 1/255 or more in one of the images whose
    weight [n] is not 0.

    >>> trigger = Trigger(mask=jnp.eye(3)[..., None], pattern=jnp.ones((3, 3, 1)))
    >>> int(changed_pixels(trigger, jnp.zeros((4, 3, 3, 1)), jnp.ones(4)))
    3
    """
    change = jnp.abs(stamp(images, trigger) - images)
    known = jnp.asarray(weights)[:, None, None, None] > 0
    largest = jnp.max(jnp.where(known, change, 0.0), axis=(0, -1))
    return jnp.sum(largest >= _LEAST_CHANGE)


def trigger_arrays(trigger: AnyTrigger, suffix: str = "") -> dict[str, np.ndarray]:
    """Return the arrays of a trigger by name, on the host, as a file has them."""
    fields = dataclasses.fields(trigger)
    return {f"{f.name}{suffix}": np.asarray(getattr(trigger, f.name)) for f in fields}


def trigger_of(arrays: Mapping[str, AnyArray], suffix: str = "") -> AnyTrigger:
    """Return the trigger whose `trigger_arrays` are among `arrays`."""
    kind = _kind_in(arrays, suffix)
    return kind(**{f.name: arrays[f"{f.name}{suffix}"] for f in dataclasses.fields(kind)})


def names_of_other_kinds(arrays: Mapping[str, AnyArray], suffix: str = "") -> tuple[str, ...]:
    """Return the names of `TRIGGER_LAYOUT` that a file with a trigger of this kind is without."""
    own = {field.name for field in dataclasses.fields(_kind_in(arrays, suffix))}
    return tuple(f"{name}{suffix}" for name in TRIGGER_LAYOUT if name not in own)


def _kind_in(arrays: Mapping[str, AnyArray], suffix: str) -> type[Trigger] | type[AddedTrigger]:
    return AddedTrigger if f"delta{suffix}" in arrays else Trigger


def _image_shape(array: AnyArray) -> ImageShape:
    height, width, channels = array.shape[-3:]
    return height, width, channels


def random_trigger(key: Array, image_shape: ImageShape) -> Trigger:
    """Return a trigger with mask and pattern uniform in [0, 1]: where an inversion starts."""
    h, w, c = image_shape
    mask_key, pattern_key = jax.random.split(key)
    return Trigger(
        mask=jax.random.uniform(mask_key, (h, w, 1)),
        pattern=jax.random.uniform(pattern_key, (h, w, c)),
    )


def jitter(trigger: Trigger, key: Array, scale: float = 0.01) -> Trigger:
    """Return `trigger` with uniform noise of ±`scale` on mask and pattern, clipped to [0, 1].

    A variable at exactly 0 or 1 sits where tanh is flat and would never move again.
    """
    leaves, structure = jax.tree.flatten(trigger)
    keys = jax.random.split(key, len(leaves))
    noisy = [
        jnp.clip(leaf + jax.random.uniform(k, leaf.shape, minval=-scale, maxval=scale), 0.0, 1.0)
        for leaf, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)


def success_rate(logits: Array, target: Array, weights: Array) -> Array:
    """Return the weighted share of `logits` [n, K] whose largest entry is `target`; 0 if no weight.

    Args:
      logits: [n, K], of stamped images.
      target: the class (scalar, or [n]) that they should be taken for.
      weights: [n], 1 for a sample and 0 for padding.
    """
    hits = (jnp.argmax(logits, axis=-1) == target).astype(logits.dtype)
    return jnp.sum(hits * weights) / jnp.maximum(jnp.sum(weights), 1.0)
