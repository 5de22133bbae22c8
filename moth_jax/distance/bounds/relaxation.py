"""Bounds of a tape's values over all triggers of a size, and what size a target needs.

Everything is centred on the clean image x. A value is bounded by its own value at x, a linear form
of the image's move δ, and a growth: so much for each pixel of mask. Affine steps are followed
exactly. A kink k(v) is k at x, plus its slope there times the move of v, plus what v's move beyond
0 adds: at most `steep` times that move, a chord. That the move costs mask is what keeps the growth
small: a neuron far from all pixels of a trigger adds nothing, however many there are.

The kinks' own inputs are bounded in one of two ways (`by_rows`), both by the same rule. A small
network is bounded backward: each value's form is pulled back to the image on its own. A network
with a larger layer is bounded forward: one form for each value, carried along with its growth. The
logits' differences are always bounded backward.

Note: the usual relaxation by linear functions (CROWN, Zhang et al. 2018, arXiv 1811.00866) bounds
an unstable ReLU by a chord over its whole range, which is above it at x already. All neurons that
some trigger might reach then add up, where no trigger reaches them all. On networks for the digits
the bounds here are up to five times as large.

Note: numbers are float32. Every bound is widened by a share of all that was summed for it
(`_ROUNDING`), which is far more than rounding moves it; what is proven is about the network in
exact arithmetic.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from moth_jax.distance.bounds.knapsack import largest, least_size, most, moves, num_corners
from moth_jax.distance.bounds.tape import Step, Tape

# Networks whose largest nonlinear layer has more values than this are bounded forward.
MOST_ROWS = 2048
_ROUNDING = 1e-4

Constants = Sequence[Array]


class Bounded(NamedTuple):
    """The input v of a kink.

    Attributes:
      value: at the clean image.
      up, down: [e, h·w, *value], what a pixel of mask moves it by, at each corner of its box.
      low, high: bounds of v.
    """

    value: Array
    up: Array
    down: Array
    low: Array
    high: Array


class Bend(NamedTuple):
    """How a kink k(v) moves with v: by `slope` times v's move and, beyond 0, by more.

    Attributes:
      slope: at the clean image.
      growth: [e, h·w, *value], how much more for each pixel of mask, at most.
      is_convex: whether it is more, rather than less.
    """

    slope: Array
    growth: Array
    is_convex: Array


def by_rows(tape: Tape) -> bool:
    """Whether the kinks' inputs are bounded backward, row by row."""
    return tape.largest_kink() <= MOST_ROWS


def bounded_by(value: Array, up: Array, down: Array, size: Array, count: int) -> Bounded:
    """Return the bounds of a value with growths `up` and `down` [e, h·w, *value]."""
    high, low = (
        most(largest(jnp.moveaxis(growth, (0, 1), (-2, -1)), count), size) for growth in (up, down)
    )
    room = _ROUNDING * (high + low) + 1e-6 * (1 + jnp.abs(value))
    return Bounded(value, up, down, value - low - room, value + high + room)


def bend_of(bounded: Bounded, below: Array, above: Array) -> Bend:
    """Return how a kink with slopes `below` and `above` 0 moves."""
    value = bounded.value
    below, above = (jnp.broadcast_to(slope, value.shape) for slope in (below, above))
    positive = value > 0
    beyond = jnp.where(positive, -bounded.low, bounded.high)
    move = beyond + jnp.abs(value)
    steep = jnp.maximum(beyond, 0) / jnp.where(move > 0, move, 1.0) * jnp.abs(above - below)
    towards_zero = jnp.maximum(jnp.where(positive[None, None], bounded.down, bounded.up), 0)
    growth = steep[None, None] * towards_zero
    return Bend(jnp.where(positive, above, below), growth, above >= below)


def backward(
    tape: Tape,
    constants: Constants,
    values: dict[int, Array],
    bends: dict[int, Bend],
    place: int,
    row: Array,
) -> tuple[Array, Array]:
    """Return how row·value grows, and how −row·value does, for each pixel of mask.

    Args:
      tape, constants: the network.
      values: at the clean image.
      bends: of each kink, by its place.
      place: of the value.
      row: of the value's shape.

    Returns:
      Two of [e, h·w], at each corner of the pixel's box.
    """
    cotangents = {place: row}
    image = values[0][0]
    up = down = jnp.zeros((num_corners(image.shape), image.shape[0] * image.shape[1]), row.dtype)
    for step in reversed(tape.steps):
        cotangent = cotangents.pop(step.output, None)
        if cotangent is None:
            continue
        if step.is_kink:
            bend = bends[step.output]
            more = jnp.where(bend.is_convex, cotangent, -cotangent)
            up += _times(bend.growth, jnp.maximum(more, 0))
            down += _times(bend.growth, jnp.maximum(-more, 0))
            parts = (cotangent * bend.slope,)
        else:
            inputs = [values[i] for i in step.inputs]
            parts = jax.vjp(lambda *xs, step=step: step(xs, constants), *inputs)[1](cotangent)
        for at, part in zip(step.inputs, parts, strict=True):
            cotangents[at] = cotangents[at] + part if at in cotangents else part
    form = cotangents.get(0, jnp.zeros_like(values[0]))
    linear = moves(form[0], image)
    return linear[0] + up, linear[1] + down


def _times(growth: Array, weights: Array) -> Array:
    """Return [e, h·w]: the sum of growths [e, h·w, *value] times weights, a matrix product."""
    return jnp.tensordot(growth, weights, weights.ndim, precision=lax.Precision.HIGHEST)


def bounds_by_rows(
    tape: Tape, constants: Constants, values: dict[int, Array], size: Array, count: int
) -> dict[int, Bounded]:
    """Return the bounds of all kinks' inputs, by the kink's place, pulled back to the image."""
    bends: dict[int, Bend] = {}
    found: dict[int, Bounded] = {}
    for step in tape.kinks:
        (place,) = step.inputs
        value = values[place]
        rows = jnp.eye(value.size, dtype=value.dtype).reshape(-1, *value.shape)
        pull = functools.partial(backward, tape, constants, values, dict(bends), place)
        up, down = (
            jnp.moveaxis(growth, 0, -1).reshape(*growth.shape[1:], *value.shape)
            for growth in jax.vmap(pull)(rows)
        )
        found[step.output] = bounded_by(value, up, down, size, count)
        bends[step.output] = bend_of(found[step.output], *_slopes(step, constants))
    return found


class _Form(NamedTuple):
    """How a value moves: by coefficients·δ, and by (centre ± radius) for each pixel of mask.

    Attributes:
      coefficients: [h·w·c, *value].
      centre, radius: [h·w, *value].
    """

    coefficients: Array
    centre: Array
    radius: Array


def bounds_by_forms(
    tape: Tape, constants: Constants, values: dict[int, Array], size: Array, count: int
) -> dict[int, Bounded]:
    """Return the bounds of all kinks' inputs, by the kink's place, carried on from the image."""
    image = values[0][0]
    basis = jnp.eye(image.size, dtype=image.dtype).reshape(-1, *values[0].shape)
    nothing = jnp.zeros((image.shape[0] * image.shape[1], *values[0].shape), image.dtype)
    forms = {0: _Form(basis, nothing, nothing)}
    last = {place: step.output for step in tape.steps for place in step.inputs}
    found: dict[int, Bounded] = {}
    for step in tape.steps:
        inputs = [forms[place] for place in step.inputs]
        if step.is_kink:
            bounded = _bounded_form(inputs[0], values[step.inputs[0]], image, size, count)
            found[step.output] = bounded
            bend = bend_of(bounded, *_slopes(step, constants))
            forms[step.output] = _through_kink(inputs[0], bend)
        else:
            forms[step.output] = _through_affine(step, inputs, values, constants)
        for place in step.inputs:
            if last[place] == step.output:
                forms.pop(place, None)
    return found


def _bounded_form(form: _Form, value: Array, image: Array, size: Array, count: int) -> Bounded:
    box = image.reshape(-1, image.shape[-1], *[1] * value.ndim)
    at = form.coefficients.reshape(*box.shape[:2], *value.shape)
    low, high = -box * at, (1 - box) * at
    up = jnp.maximum(low, high).sum(1) + form.centre + form.radius
    down = jnp.maximum(-low, -high).sum(1) - form.centre + form.radius
    return bounded_by(value, up[None], down[None], size, count)


def _through_affine(step: Step, inputs: list[_Form], values, constants: Constants) -> _Form:
    at = [values[place] for place in step.inputs]

    def push(*tangents):
        return jax.jvp(lambda *inputs: step(inputs, constants), at, list(tangents))[1]

    def spread(*radii):
        return step.spread(radii, constants)

    coefficients, centres, radii = zip(*inputs, strict=True)
    return _Form(jax.vmap(push)(*coefficients), jax.vmap(push)(*centres), jax.vmap(spread)(*radii))


def _through_kink(form: _Form, bend: Bend) -> _Form:
    slope, half = bend.slope[None], bend.growth[0] / 2
    return _Form(
        slope * form.coefficients,
        slope * form.centre + jnp.where(bend.is_convex[None], half, -half),
        jnp.abs(slope) * form.radius + half,
    )


def _slopes(step: Step, constants: Constants) -> list[Array]:
    return [constants[place] for place in step.constants]


@functools.partial(jax.jit, static_argnames=("tape", "count", "num_rivals"))
def reached_sizes(
    tape: Tape,
    constants: Constants,
    images: Array,
    sizes: Array,
    targets: Array,
    *,
    count: int,
    num_rivals: int,
) -> Array:
    """Return how large a trigger must be to send each image to each target, as known at `sizes`.

    The proof holds for triggers up to `sizes`, and so does the answer: it is at most that, but inf
    where no trigger at all sends the image.

    Args:
      tape, constants: the network.
      images: [n, h, w, c].
      sizes: [n], of Σm.
      targets: [T].
      count: how many pixels are sorted, at least the largest of `sizes` or all.
      num_rivals: so many classes, the likeliest of the clean image, have to be overtaken.

    Returns:
      [n, T].
    """

    def one(image: Array, size: Array) -> Array:
        return _reached(tape, constants, image, size, targets, count, num_rivals)

    return jax.vmap(one)(images, sizes)


def bounds_of(
    tape: Tape, constants: Constants, image: Array, size: Array, count: int
) -> tuple[dict[int, Array], dict[int, Bounded]]:
    """Return all values at an image [h, w, c], and the bounds of all kinks' inputs."""
    values = tape.values(image[None], constants)
    bound = bounds_by_rows if by_rows(tape) else bounds_by_forms
    return values, bound(tape, constants, values, size, count)


def _reached(
    tape: Tape,
    constants: Constants,
    image: Array,
    size: Array,
    targets: Array,
    count: int,
    num_rivals: int,
) -> Array:
    values, bounded = bounds_of(tape, constants, image, size, count)
    bends = {
        step.output: bend_of(bounded[step.output], *_slopes(step, constants)) for step in tape.kinks
    }
    logits = values[tape.output][0]
    rivals = lax.top_k(logits, num_rivals)[1]
    classes = jnp.eye(tape.num_classes, dtype=logits.dtype)
    # [T, R, K]: z_t − z_k of each target and rival.
    rows = classes[targets][:, None] - classes[rivals][None]

    def one(row: Array) -> Array:
        up, _ = backward(tape, constants, values, bends, tape.output, row[None])
        gains = largest(up, count)
        room = _ROUNDING * (jnp.abs(row) @ jnp.abs(logits) + most(gains, size))
        return least_size(gains, -(row @ logits) - room)

    reached = jax.vmap(jax.vmap(one))(rows).max(1)
    pixels = np.prod(image.shape[:2])
    never = (reached > pixels) & (size >= pixels)
    return jnp.where(never, jnp.inf, jnp.minimum(reached, size))


@functools.partial(jax.jit, static_argnames=("tape",))
def affine_form(tape: Tape, constants: Constants) -> tuple[Array, Array]:
    """Return (A [K, h, w, c], b [K]) of a network without kinks: its logits are A·x + b."""
    values = tape.values(jnp.zeros(tape.shapes[0], jnp.float32), constants)

    def logits(image: Array) -> Array:
        return tape.values(image, constants)[tape.output][0]

    return jax.jacrev(logits)(values[0])[:, 0], values[tape.output][0]
