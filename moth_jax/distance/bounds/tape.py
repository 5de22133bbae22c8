"""A classifier of one image as a list of affine steps and kinks, read off its jaxpr.

A kink is the one nonlinearity: a function of one number that is linear on either side of 0. ReLU
is one, and so is all that is made of it: leaky ReLU, |x|, clipping, the maximum of two (and so max
pooling). Everything that does not depend on the image is computed here, once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend import core

from moth_jax.errors import InputError
from moth_jax.types import LogitsFn, Variables

KNOWN = (
    "dense and convolution layers, batch normalisation in inference mode, ReLU, leaky ReLU, "
    "clipping, average and max pooling, additions, reshapes and the like"
)
# Affine in all their arguments together.
_ADDITIVE = {
    *("add", "add_any", "sub", "neg", "concatenate", "stack", "tile", "pad"),
    *("reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim", "rev", "slice"),
    *("reduce_sum", "reduce_window_sum", "cumsum", "copy", "copy_p", "name"),
}
# Linear in the first argument, the others being numbers that do not depend on the image.
_LINEAR_IN_FIRST = {"div", "gather", "dynamic_slice"}
_BILINEAR = {"mul", "dot_general", "conv_general_dilated"}
# What may be done to values some of which are -inf, the padding of max pooling.
_MOVES = {
    *("reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim", "rev", "slice"),
    *("copy", "copy_p", "name", "gather", "dynamic_slice"),
}
_CALLS = ("jaxpr", "call_jaxpr")  # parameters that hold what a call computes


class Step(NamedTuple):
    """One step: value `output` from the values `inputs` and the constants `constants`.

    Attributes:
      output: the place of the value that it computes; 0 is the image.
      inputs: places of earlier values.
      constants: places among the tape's constants; a kink's are its slopes below and above 0.
      primitive: JAX's, whose arguments are taken in the order of `order`; None for a kink.
      params: of the primitive, name and value.
      order: True for an input, False for a constant.
    """

    output: int
    inputs: tuple[int, ...]
    constants: tuple[int, ...]
    primitive: core.Primitive | None = None
    params: tuple[tuple[str, Any], ...] = ()
    order: tuple[bool, ...] = ()

    @property
    def is_kink(self) -> bool:
        """Whether it is the nonlinearity."""
        return self.primitive is None

    def __call__(self, inputs: Sequence[Array], constants: Sequence[Array]) -> Array:
        """Return the value, given those of all inputs and all constants of the tape."""
        own = [constants[place] for place in self.constants]
        return kink(inputs[0], *own) if self.primitive is None else self._bind(inputs, own)

    def _bind(self, inputs: Sequence[Array], constants: Sequence[Array]) -> Array:
        given, fixed = iter(inputs), iter(constants)
        arguments = [next(given) if is_input else next(fixed) for is_input in self.order]
        assert self.primitive is not None
        return self.primitive.bind(*arguments, **dict(self.params))

    def spread(self, radii: Sequence[Array], constants: Sequence[Array]) -> Array:
        """Return how far an affine step's value may move where its inputs move by `radii` >= 0."""
        assert self.primitive is not None
        own = [constants[place] for place in self.constants]
        name = self.primitive.name
        if name == "neg":
            return radii[0]
        if name in _BILINEAR | {"div"}:
            return self._bind(radii, [jnp.abs(constant) for constant in own])
        if name == "sub":
            return functools.reduce(jnp.add, radii, jnp.zeros(()))
        if name in _LINEAR_IN_FIRST or name == "select_n":  # indices, and choices
            kept = [c if _is_choice(c) else jnp.zeros_like(c) for c in own]
            return self._bind(radii, kept)
        return self._bind(radii, [jnp.zeros_like(constant) for constant in own])


def _is_choice(constant: Array) -> bool:
    return not jnp.issubdtype(constant.dtype, jnp.floating)


def kink(x: Array, below: Array, above: Array) -> Array:
    """Return x times the slope `below` where it is negative, times that `above` elsewhere."""
    return below * jnp.minimum(x, 0) + above * jnp.maximum(x, 0)


@dataclasses.dataclass(frozen=True)
class Tape:
    """A function of one image [1, h, w, c] to logits [1, K]. It is hashable: `jit` takes it.

    Attributes:
      steps: in order.
      output: the place of the logits.
      shapes: of all values, by place.
    """

    steps: tuple[Step, ...]
    output: int
    shapes: tuple[tuple[int, ...], ...]

    @property
    def kinks(self) -> list[Step]:
        """The nonlinear steps."""
        return [step for step in self.steps if step.is_kink]

    @property
    def num_classes(self) -> int:
        """K."""
        return self.shapes[self.output][-1]

    def largest_kink(self) -> int:
        """Return the number of values of the largest nonlinear step."""
        return max((math.prod(self.shapes[step.output]) for step in self.kinks), default=0)

    def values(self, image: Array, constants: Sequence[Array]) -> dict[int, Array]:
        """Return all values for an image [1, h, w, c], by place."""
        values = {0: image}
        for step in self.steps:
            values[step.output] = step([values[i] for i in step.inputs], constants)
        return values


class _Value(NamedTuple):
    """A value that depends on the image, and where it is -inf (padding) instead."""

    place: int
    absent: np.ndarray | None = None


class _Sign(NamedTuple):
    """Where a value is positive, or not negative: they differ at 0, where a kink is 0."""

    place: int
    positive: bool


def record(
    logits_fn: LogitsFn, variables: Variables, image_shape: Sequence[int]
) -> tuple[Tape, list[Array]]:
    """Return the tape of a classifier, and its constants.

    Raises:
      InputError: it has a layer that is not known, which is named.
    """
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    closed = jax.make_jaxpr(functools.partial(logits_fn, variables))(image)
    recorder = _Recorder(tuple(image.shape))
    (output,) = recorder.run(closed.jaxpr, closed.consts, [_Value(0)])
    if not isinstance(output, _Value) or output.absent is not None:
        raise _unknown("an output that does not depend on the image")
    return recorder.tape(output.place), [jnp.asarray(c) for c in recorder.constants]


class _Recorder:
    """Walks through a jaxpr and writes down what depends on the image."""

    def __init__(self, image_shape: tuple[int, ...]):
        self.steps: list[Step] = []
        self.constants: list[Array] = []
        self._shapes = [image_shape]
        self._scaled: dict[int, tuple[int, Array]] = {}  # value: of which it is a multiple
        self._special: dict[str, Callable] = {
            "max": self._max_of,
            "min": self._min_of,
            "abs": lambda eqn, x: self._kink(x, -1.0, 1.0),
            "clamp": lambda eqn, low, x, high: self._min(self._max(x, low), high),
            "select_n": self._select,
            "split": self._split,
            "reduce_max": self._reduce_max,
            "reduce_window_max": self._reduce_window_max,
            "stop_gradient": lambda eqn, value: value,  # whose gradient is not that of what it does
            "optimization_barrier": lambda eqn, *values: list(values),
            **dict.fromkeys(("gt", "ge", "lt", "le"), self._compare),
        }

    def tape(self, output: int) -> Tape:
        """Return what is written, without what the output does not need."""
        needed, steps = {output}, []
        for step in reversed(self.steps):
            if step.output in needed:
                needed.update(step.inputs)
                steps.append(step)
        return Tape(tuple(reversed(steps)), output, tuple(self._shapes))

    def run(self, jaxpr: core.Jaxpr, consts: Sequence, arguments: Sequence) -> list:
        known: dict = dict(zip(jaxpr.constvars, consts, strict=True))
        known.update(zip(jaxpr.invars, arguments, strict=True))

        def read(atom):
            return jnp.asarray(atom.val) if isinstance(atom, core.Literal) else known[atom]

        for eqn in jaxpr.eqns:
            results = self._equation(eqn, [read(atom) for atom in eqn.invars])
            known.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn, arguments: list) -> list:
        """Return the results of an equation: constants, or values of new steps."""
        name = eqn.primitive.name
        if name == "platform_index":
            # All platforms compute the same. The last way is the one for any of them.
            return [jnp.asarray(len(eqn.params["platforms"]) - 1, jnp.int32)]
        depends = [isinstance(argument, _Value | _Sign) for argument in arguments]
        inner = next((eqn.params[key] for key in _CALLS if key in eqn.params), None)
        if name == "cond" and not depends[0]:
            branch = int(np.clip(arguments[0], 0, len(eqn.params["branches"]) - 1))
            inner, arguments = eqn.params["branches"][branch], arguments[1:]
        if inner is not None and name not in ("scan", "while", "pallas_call"):
            closed = isinstance(inner, core.ClosedJaxpr)
            return self.run(*((inner.jaxpr, inner.consts) if closed else (inner, ())), arguments)
        if not any(depends):
            results = eqn.primitive.bind(*arguments, **eqn.params)
            return results if eqn.primitive.multiple_results else [results]
        if name in self._special:
            results = self._special[name](eqn, *arguments)
            return results if isinstance(results, list) else [results]
        return [self._affine(eqn, arguments)]

    def _affine(self, eqn, arguments: list) -> _Value:
        name = eqn.primitive.name
        is_value = [isinstance(argument, _Value) for argument in arguments]
        affine = (
            name in _ADDITIVE
            or (name in _LINEAR_IN_FIRST and not any(is_value[1:]))
            or (name in _BILINEAR and sum(is_value) == 1)
            or (name == "convert_element_type" and eqn.params["new_dtype"] == jnp.float32)
        )
        if not affine or any(isinstance(argument, _Sign) for argument in arguments):
            raise _unknown(_described(eqn))
        params = dict(eqn.params)
        if name in ("dot_general", "conv_general_dilated"):
            params["precision"] = (lax.Precision.HIGHEST,) * 2
        if name == "pad" and not is_value[1] and bool(jnp.isneginf(arguments[1])):
            return self._pad_with_nothing(eqn, arguments[0])
        absent = [argument.absent for argument in arguments if isinstance(argument, _Value)]
        moved = None
        if any(mask is not None for mask in absent):
            if name not in _MOVES:
                raise _unknown(f"{_described(eqn)} of values padded with -inf")
            rest = [jnp.asarray(argument) for argument in arguments[1:]]
            moved = np.asarray(eqn.primitive.bind(jnp.asarray(absent[0]), *rest, **eqn.params))
        value = self._step(eqn.primitive, arguments, params, eqn.outvars[0].aval.shape)
        if name == "mul" or name == "neg":
            factor = [a for a in arguments if not isinstance(a, _Value)] or [jnp.asarray(-1.0)]
            (of,) = [a for a in arguments if isinstance(a, _Value)]
            self._scaled[value.place] = of.place, factor[0]
        return value._replace(absent=moved)

    def _step(self, primitive, arguments: Sequence, params: dict, shape) -> _Value:
        """Write down an affine step."""
        self.steps.append(
            Step(
                output=len(self._shapes),
                inputs=tuple(a.place for a in arguments if isinstance(a, _Value)),
                constants=self._keep(a for a in arguments if not isinstance(a, _Value)),
                primitive=primitive,
                params=tuple(sorted(params.items())),
                order=tuple(isinstance(a, _Value) for a in arguments),
            )
        )
        return self._new(shape)

    def _keep(self, arrays) -> tuple[int, ...]:
        first = len(self.constants)
        self.constants += map(jnp.asarray, arrays)
        return tuple(range(first, len(self.constants)))

    def _new(self, shape: Sequence[int]) -> _Value:
        self._shapes.append(tuple(shape))
        return _Value(len(self._shapes) - 1)

    def _shape(self, value: _Value) -> tuple[int, ...]:
        return self._shapes[value.place]

    def _apply(self, function: Callable, *arguments) -> Any:
        """Write down a function of values and constants, each the steps of its own jaxpr."""
        shown = [
            jax.ShapeDtypeStruct(self._shape(a), jnp.float32) if isinstance(a, _Value) else a
            for a in arguments
        ]
        closed = jax.make_jaxpr(function)(*shown)
        results = self.run(closed.jaxpr, closed.consts, arguments)
        return results[0] if len(results) == 1 else results

    def _pad_with_nothing(self, eqn, value) -> _Value:
        shape = self._shape(value)
        absent = np.zeros(shape, bool) if value.absent is None else value.absent
        config = eqn.params["padding_config"]
        arguments = [value, jnp.zeros((), jnp.float32)]
        padded = self._step(eqn.primitive, arguments, eqn.params, eqn.outvars[0].aval.shape)
        mask = lax.pad(jnp.asarray(absent), jnp.asarray(True), config)
        return padded._replace(absent=np.asarray(mask))

    # Kinks.

    def _kink(self, value: _Value, below, above) -> _Value:
        if value.absent is not None:
            raise _unknown("a nonlinearity of values padded with -inf")
        shape = self._shape(value)
        slopes = [jnp.asarray(slope, jnp.float32) for slope in (below, above)]
        place = len(self._shapes)
        self.steps.append(Step(place, (value.place,), self._keep(slopes)))
        return self._new(shape)

    def _max_of(self, eqn, a, b):
        return self._max(a, b)

    def _min_of(self, eqn, a, b):
        return self._min(a, b)

    def _min(self, a, b) -> Any:
        negative = [self._apply(jnp.negative, x) for x in (a, b)]
        return self._apply(jnp.negative, self._max(*negative))

    def _max(self, a, b) -> Any:
        """Return the larger of two, one of which may be a constant."""
        if not isinstance(a, _Value):
            a, b = b, a
        if not isinstance(b, _Value):
            if a.absent is None and _is_zero(b):
                return self._kink(a, 0.0, 1.0)
            if bool(jnp.all(jnp.isneginf(b))) and a.absent is None:
                return a
            b = jnp.broadcast_to(b, self._shape(a))
            return self._apply(jnp.add, self._kink(self._apply(jnp.subtract, a, b), 0.0, 1.0), b)
        masks = [np.zeros(self._shape(a), bool) if v.absent is None else v.absent for v in (a, b)]
        a, b = (value._replace(absent=None) for value in (a, b))
        if not any(mask.any() for mask in masks):
            difference, base = self._apply(jnp.subtract, a, b), b
        else:
            one = masks[0] | masks[1]
            difference = self._apply(lambda a, b: (a - b) * (1.0 - one), a, b)
            base = self._apply(lambda a, b: a * (1.0 * masks[1]) + b * (1.0 - masks[1]), a, b)
        larger = self._apply(jnp.add, base, self._kink(difference, 0.0, 1.0))
        both = masks[0] & masks[1]
        return larger._replace(absent=both if both.any() else None)

    def _compare(self, eqn, a, b) -> _Sign:
        greater = eqn.primitive.name in ("gt", "ge")
        if not isinstance(a, _Value):
            a, b, greater = b, a, not greater
        if (
            not isinstance(a, _Value)
            or isinstance(b, _Value)
            or not _is_zero(b)
            or a.absent is not None
        ):
            raise _unknown(f"{_described(eqn)} other than of a value with 0")
        return _Sign(a.place, greater)

    def _select(self, eqn, which, *cases) -> _Value:
        if not isinstance(which, _Sign):
            if any(isinstance(case, _Value) and case.absent is not None for case in cases):
                raise _unknown(f"{_described(eqn)} of values padded with -inf")
            return self._step(eqn.primitive, [which, *cases], eqn.params, eqn.outvars[0].aval.shape)
        slopes = [self._multiple(case, which.place) for case in cases]
        if len(slopes) != 2 or any(slope is None for slope in slopes):
            raise _unknown(f"{_described(eqn)} other than of multiples of the value compared")
        below, above = slopes if which.positive else slopes[::-1]
        return self._kink(_Value(which.place), below, above)

    def _multiple(self, case, place: int):
        """Return which multiple of the value at `place` a case is, None if it is none."""
        if not isinstance(case, _Value):
            return 0.0 if _is_zero(case) else None
        if case.place == place:
            return 1.0
        of, factor = self._scaled.get(case.place, (None, None))
        return factor if of == place else None

    def _split(self, eqn, value: _Value) -> list:
        ends = np.cumsum(eqn.params["sizes"])
        axis = eqn.params["axis"]
        parts = zip(ends - eqn.params["sizes"], ends, strict=True)
        return [
            self._moved(lambda x, a=a, b=b: lax.slice_in_dim(x, int(a), int(b), axis=axis), value)
            for a, b in parts
        ]

    def _reduce_max(self, eqn, value: _Value) -> _Value:
        axes = eqn.params["axes"]
        shape = self._shape(value)
        kept = [axis for axis in range(len(shape)) if axis not in axes]
        flat = [shape[axis] for axis in kept]

        def to_rows(x):
            return x.transpose(*axes, *kept).reshape(-1, *flat)

        rows = self._moved(to_rows, value)
        count = self._shape(rows)[0]
        return self._largest([self._moved(lambda x, i=i: x[i], rows) for i in range(count)])

    def _reduce_window_max(self, eqn, value: _Value) -> _Value:
        params = eqn.params
        window, dilation = params["window_dimensions"], params["window_dilation"]
        if any(d != 1 for d in params["base_dilation"]):
            raise _unknown(f"{_described(eqn)} with gaps between its inputs")
        pads = [(low, high, 0) for low, high in params["padding"]]
        if any(low or high for low, high, _ in pads):
            value = self._moved(lambda x: lax.pad(x, -jnp.inf, pads), value)
        shape, strides = eqn.outvars[0].aval.shape, params["window_strides"]

        def view(x, place):
            start = [p * d for p, d in zip(place, dilation, strict=True)]
            sizes = zip(start, shape, strides, strict=True)
            return lax.slice(x, start, [a + (n - 1) * s + 1 for a, n, s in sizes], strides)

        places = np.ndindex(*window)
        return self._largest([self._moved(lambda x, p=p: view(x, p), value) for p in places])

    def _moved(self, function: Callable, value: _Value) -> _Value:
        return self._apply(function, value)

    def _largest(self, values: list) -> _Value:
        """Return the largest of several: pairs, then pairs of these, for bounds that stay tight."""
        while len(values) > 1:
            pairs = [values[i : i + 2] for i in range(0, len(values), 2)]
            values = [self._max(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
        return values[0]


def _is_zero(constant) -> bool:
    return not bool(jnp.any(jnp.asarray(constant) != 0))


def _described(eqn) -> str:
    shape = "x".join(map(str, eqn.outvars[0].aval.shape[1:])) or "one number"
    return f"{eqn.primitive.name!r} (to {shape})"


def _unknown(what: str) -> InputError:
    return InputError(
        f"no certified distances: they do not know the layer {what}; they know {KNOWN}"
    )
