"""Linear bounds of a tape's values over all triggers of a size, and what size a target needs.

Everything is centred on the clean image x: a value's bound over all images x + δ is its own value
at x, plus a slack, plus the largest value of a linear form a·δ (`knapsack`). Affine steps are
followed exactly. An unstable kink lies between its chord and a line through 0 (CROWN, Zhang et al.
2018, arXiv 1811.00866), whose slope is chosen, or optimised (arXiv 2011.13824).

The kinks' own inputs are bounded in one of two ways (`by_rows`). A small layer is bounded backward:
each of its values has a form of its own, relaxed all the way to the image. A network with a larger
layer is bounded forward: one form for each value, carried along, and the slack of all relaxations
as an interval beside it. The logits' differences are always bounded backward.

Note: numbers are float32. Every bound is widened by a share of all that was summed for it
(`_ROUNDING`), far more than rounding was ever seen to move it; the bounds are of the network
in exact arithmetic.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from moth_jax.distance.bounds.knapsack import largest_gains, least_size, most
from moth_jax.distance.bounds.tape import Step, Tape, kink

# Networks whose largest nonlinear layer has more values than this are bounded forward.
MOST_ROWS = 2048
_ROUNDING = 1e-5
_LEARNING_RATE = 0.1  # of the slopes, which are in [0, 1]

Constants = Sequence[Array]


class Line(NamedTuple):
    """What a kink lies between, as a function of its input v.

    Attributes:
      upper, lower: slopes.
      above, below: how far the lines are above and below the kink at the clean image's v.
    """

    upper: Array
    lower: Array
    above: Array
    below: Array


class Bounded(NamedTuple):
    """The inputs of a kink at the clean image, and their bounds."""

    value: Array
    low: Array
    high: Array


def by_rows(tape: Tape) -> bool:
    """Whether the kinks' inputs are bounded backward, row by row."""
    return tape.largest_kink() <= MOST_ROWS


def lines_of(bounded: Bounded, below: Array, above: Array, tangent: Array | None = None) -> Line:
    """Return the lines around a kink with slopes `below` and `above` 0.

    `tangent` in [0, 1] is the place of the free line's slope between the two; the nearer one to
    the chord if None.
    """
    value, low, high = bounded
    below, above = (jnp.broadcast_to(slope, value.shape) for slope in (below, above))
    start, end = kink(low, below, above), kink(high, below, above)
    unstable = (low < 0) & (high > 0)
    chord = (end - start) / jnp.where(unstable, high - low, 1.0)
    if tangent is None:
        tangent = (high > -low).astype(value.dtype)
    free = below + tangent * (above - below)
    stable = jnp.where(low >= 0, above, below)
    offset = jnp.where(unstable, start - chord * low, 0.0)  # of the chord at v = 0
    chord, free = (jnp.where(unstable, slope, stable) for slope in (chord, free))
    convex = above >= below
    now = kink(value, below, above)
    chord_gap, free_gap = chord * value + offset - now, free * value - now
    return Line(
        upper=jnp.where(convex, chord, free),
        lower=jnp.where(convex, free, chord),
        above=jnp.maximum(jnp.where(convex, chord_gap, free_gap), 0.0),
        below=jnp.maximum(-jnp.where(convex, free_gap, chord_gap), 0.0),
    )


def _pull(step: Step, values: dict[int, Array], constants: Constants, cotangent: Array):
    """Return the cotangents of an affine step's inputs."""
    inputs = [values[place] for place in step.inputs]
    return jax.vjp(lambda *inputs: step(inputs, constants), *inputs)[1](cotangent)


def backward(
    tape: Tape,
    constants: Constants,
    values: dict[int, Array],
    lines: dict[int, Line],
    place: int,
    row: Array,
) -> tuple[Array, Array]:
    """Return (a, slack): row·value <= row·(value at x) + slack + a·δ for every x + δ.

    Args:
      tape, constants: the network.
      values: at the clean image.
      lines: around each kink, by its place.
      place: of the value.
      row: of the value's shape.
    """
    cotangents, slack = {place: row}, jnp.zeros((), row.dtype)
    for step in reversed(tape.steps):
        cotangent = cotangents.pop(step.output, None)
        if cotangent is None:
            continue
        if step.is_kink:
            line = lines[step.output]
            up, down = jnp.maximum(cotangent, 0), jnp.minimum(cotangent, 0)
            slack += jnp.sum(up * line.above - down * line.below)
            parts = (up * line.upper + down * line.lower,)
        else:
            parts = _pull(step, values, constants, cotangent)
        for place, part in zip(step.inputs, parts, strict=True):
            cotangents[place] = cotangents[place] + part if place in cotangents else part
    return cotangents.get(0, jnp.zeros_like(values[0])), slack


def _widened(value: Array, low: Array, high: Array) -> Bounded:
    room = _ROUNDING * (jnp.abs(value) + high - low) + 1e-7
    return Bounded(value, low - room, high + room)


def _bounds_by_rows(
    tape: Tape, constants: Constants, values: dict[int, Array], size: Array, count: int
) -> dict[int, Bounded]:
    """Return the bounds of all kinks' inputs, each value's form pulled back to the image."""
    lines: dict[int, Line] = {}
    found: dict[int, Bounded] = {}
    image = values[0][0]
    for step in tape.kinks:
        (place,) = step.inputs
        value = values[place]
        rows = jnp.eye(value.size, dtype=value.dtype).reshape(-1, *value.shape)

        def reach(row, place=place, lines=dict(lines)):  # noqa: B006 (a copy of now)
            form, slack = backward(tape, constants, values, lines, place, row)
            return slack + most(largest_gains(form[0], image, count), size)

        up, down = (jax.vmap(reach)(sign * rows).reshape(value.shape) for sign in (1.0, -1.0))
        found[step.output] = _widened(value, value - down, value + up)
        lines[step.output] = lines_of(found[step.output], *_slopes(step, constants))
    return found


class _Form(NamedTuple):
    """A value around the clean image's: coefficients·δ + centre ± radius.

    Attributes:
      coefficients: [h·w·c, *value].
      centre, radius: of the value's shape.
    """

    coefficients: Array
    centre: Array
    radius: Array


def _bounds_by_forms(
    tape: Tape, constants: Constants, values: dict[int, Array], size: Array, count: int
) -> dict[int, Bounded]:
    """Return the bounds of all kinks' inputs, each value's form carried on from the image."""
    image = values[0][0]
    basis = jnp.eye(image.size, dtype=image.dtype).reshape(-1, *values[0].shape)
    nothing = jnp.zeros_like(values[0])
    forms = {0: _Form(basis, nothing, nothing)}
    last = {place: step.output for step in tape.steps for place in step.inputs}
    found: dict[int, Bounded] = {}
    for step in tape.steps:
        inputs = [forms[place] for place in step.inputs]
        if step.is_kink:
            (place,) = step.inputs
            form, value = inputs[0], values[place]
            columns = form.coefficients.reshape(*image.shape, value.size)
            columns = jnp.moveaxis(columns, -1, 0)
            up, down = (
                most(largest_gains(sign * columns, image, count), size).reshape(value.shape)
                for sign in (1.0, -1.0)
            )
            low = value + form.centre - form.radius - down
            bounded = _widened(value, low, value + form.centre + form.radius + up)
            found[step.output] = bounded
            forms[step.output] = _through_kink(form, bounded, *_slopes(step, constants))
        else:
            forms[step.output] = _through_affine(step, inputs, values, constants)
        for place in step.inputs:
            if last[place] == step.output:
                forms.pop(place, None)
    return found


def _through_affine(step: Step, inputs: list[_Form], values, constants: Constants) -> _Form:
    at = [values[place] for place in step.inputs]

    def push(*tangents):
        return jax.jvp(lambda *inputs: step(inputs, constants), at, list(tangents))[1]

    coefficients = jax.vmap(push)(*(form.coefficients for form in inputs))
    centre = push(*(form.centre for form in inputs))
    return _Form(coefficients, centre, step.spread([form.radius for form in inputs], constants))


def _through_kink(form: _Form, bounded: Bounded, below: Array, above: Array) -> _Form:
    """Return the form of a kink: two parallel lines, of the chord's slope."""
    value, low, high = bounded
    below, above = (jnp.broadcast_to(slope, value.shape) for slope in (below, above))
    unstable = (low < 0) & (high > 0)
    start, end = kink(low, below, above), kink(high, below, above)
    chord = (end - start) / jnp.where(unstable, high - low, 1.0)
    slope = jnp.where(unstable, chord, jnp.where(low >= 0, above, below))
    offset = jnp.where(unstable, start - slope * low, 0.0)  # the kink is 0 to this above slope·v
    radius = jnp.abs(offset) / 2 * (1 + _ROUNDING)
    centre = slope * form.centre + offset / 2 + slope * value - kink(value, below, above)
    return _Form(slope * form.coefficients, centre, jnp.abs(slope) * form.radius + radius)


def _slopes(step: Step, constants: Constants) -> list[Array]:
    return [constants[place] for place in step.constants]


class Differences(NamedTuple):
    """For each target, bounds of logit differences z_t − z_k at a size.

    Attributes:
      rest: [T], the value at x plus slack, and what rounding may add.
      gains: [T, count], largest gains of the form.
    """

    rest: Array
    gains: Array


@functools.partial(jax.jit, static_argnames=("tape", "count", "num_rivals", "num_steps"))
def reached_sizes(
    tape: Tape,
    constants: Constants,
    images: Array,
    sizes: Array,
    targets: Array,
    *,
    count: int,
    num_rivals: int,
    num_steps: int,
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
      num_rivals: so many of the other classes, the likeliest, have to be overtaken.
      num_steps: of the slopes' optimisation.

    Returns:
      [n, T].
    """

    def one(image: Array, size: Array) -> Array:
        return _reached(tape, constants, image, size, targets, count, num_rivals, num_steps)

    return jax.vmap(one)(images, sizes)


def _reached(tape, constants, image, size, targets, count, num_rivals, num_steps) -> Array:
    values = tape.values(image[None], constants)
    bounds_of = _bounds_by_rows if by_rows(tape) else _bounds_by_forms
    bounded = bounds_of(tape, constants, values, size, count)
    logits = values[tape.output][0]
    rivals = jax.lax.top_k(logits, num_rivals)[1]
    # [T, R, K]: z_t − z_k of each target and rival.
    classes = jnp.eye(tape.num_classes, dtype=logits.dtype)
    rows = classes[targets][:, None] - classes[rivals][None]

    def difference(row: Array, tangents) -> Differences:
        lines = {
            step.output: lines_of(
                bounded[step.output],
                *_slopes(step, constants),
                None if tangents is None else tangents[step.output],
            )
            for step in tape.kinks
        }
        form, slack = backward(tape, constants, values, lines, tape.output, row[None])
        gains = largest_gains(form[0], image, count)
        start = row @ logits
        room = jnp.abs(row) @ jnp.abs(logits) + slack + most(gains, size)
        return Differences(start + slack + _ROUNDING * room, gains)

    def proven(found: Differences) -> Array:
        return least_size(found.gains, -found.rest)

    by_rival = proven(jax.vmap(jax.vmap(lambda row: difference(row, None)))(rows))
    reached = by_rival.max(1)
    if num_steps:
        best = rows[jnp.arange(len(targets)), by_rival.argmax(1)]
        other = jax.vmap(
            lambda best, rows: _optimised(tape, bounded, difference, best, rows, size, num_steps)
        )(best, rows)
        reached = jnp.maximum(reached, jax.vmap(proven)(other))
    none = reached >= np.prod(image.shape[:2])
    everything = size >= np.prod(image.shape[:2])
    return jnp.where(none & everything, jnp.inf, jnp.minimum(reached, size))


def _optimised(tape, bounded, difference, best, rows, size, num_steps) -> Differences:
    """Return the bound of the best mixture of rivals with the best slopes that are found.

    A trigger that sends an image overtakes every rival, and so their mixtures.
    """
    tangents = {
        place: (kept.high > -kept.low).astype(kept.value.dtype) for place, kept in bounded.items()
    }
    is_best = jnp.all(rows == best, 1)
    weights = jnp.where(is_best, 0.0, -3.0)
    optimiser = optax.adam(_LEARNING_RATE)

    def bound(free):
        tangents, weights = free
        row = jax.nn.softmax(weights) @ rows
        tangents = jax.tree.map(lambda t: jnp.clip(t, 0.0, 1.0), tangents)
        found = difference(row, tangents)
        return found.rest + most(found.gains, size), found

    def step(carry, _):
        free, state = carry
        gradient = jax.grad(lambda free: bound(free)[0])(free)
        updates, state = optimiser.update(gradient, state)
        tangents, weights = optax.apply_updates(free, updates)
        tangents = jax.tree.map(lambda t: jnp.clip(t, 0.0, 1.0), tangents)
        return ((tangents, weights), state), None

    free = (tangents, weights)
    (free, _), _ = jax.lax.scan(step, (free, optimiser.init(free)), None, length=num_steps)
    return bound(free)[1]
