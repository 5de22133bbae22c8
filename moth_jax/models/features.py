"""Feature maps of any classifier: the values that its function marks by a name.

A model says which values are its feature maps by passing them through
`jax.ad_checkpoint.checkpoint_name(x, name)`, which changes nothing about what is computed. This
package's models and converted ones do, and any function of a user can.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from moth_jax.errors import InputError
from moth_jax.models.classifier import Classifier
from moth_jax.types import Variables

__all__ = ["stages", "with_features", "with_replaced"]

_CALLS = ("jit", "pjit", "closed_call", "core_call")
_REMAT = ("remat2", "checkpoint")  # jax.checkpoint; what is kept for a gradient changes no value
Visit = Callable[[str, Array], Array]


def with_features(function: Callable) -> Callable[..., tuple[Any, dict[str, Array]]]:
    """`function`, which also returns its marked values by name, in the order of computation.

    A name that is marked several times keeps its last value.

    >>> from jax.ad_checkpoint import checkpoint_name
    >>> squared, marked = with_features(lambda x: checkpoint_name(x * x, "square") + 1)(3.0)
    >>> float(squared), float(marked["square"])
    (10.0, 9.0)
    """

    def call(*arguments):
        marked: dict[str, Array] = {}

        def keep(name: str, value: Array) -> Array:
            marked.pop(name, None)
            marked[name] = value
            return value

        return _evaluate(function, arguments, keep), marked

    return call


def with_replaced(function: Callable, name: str, change: Callable[[Array], Array]) -> Callable:
    """`function` with `change` applied to the value marked `name`.

    >>> from jax.ad_checkpoint import checkpoint_name
    >>> function = lambda x: checkpoint_name(x * x, "square") + 1
    >>> float(with_replaced(function, "square", lambda value: 2 * value)(3.0))
    19.0
    """
    return lambda *arguments: _evaluate(
        function, arguments, lambda found, value: change(value) if found == name else value
    )


def stages(classifier: Classifier, variables: Variables) -> tuple[str, ...]:
    """The names of the feature maps that end the stages: the last of each resolution, in order.

    Maps of a single position are left out, and one with a channel for each class gives way to one
    before it: those are logits that have yet to be averaged.

    Raises:
      InputError: the model marks no feature maps.
    """
    spec = classifier.spec
    images = jax.ShapeDtypeStruct((2, *spec.image_shape), jnp.float32)
    last: dict[tuple[int, ...], str] = {}
    preferred: dict[tuple[int, ...], str] = {}

    def note(name: str, value: Array) -> Array:
        if value.ndim == 4 and value.shape[1:3] != (1, 1):
            place = value.shape[1:3]
            last.pop(place, None)  # so that the dict is in the order of the last ones
            last[place] = name
            if value.shape[3] != spec.num_classes:
                preferred[place] = name
        return value

    jax.eval_shape(lambda *given: _evaluate(classifier.predict, given, note), variables, images)
    if not last:
        raise InputError(
            f"{spec.arch} marks no feature maps; pass the output of each of its stages, "
            "[n, h, w, c], through jax.ad_checkpoint.checkpoint_name(x, name)"
        )
    return tuple(preferred.get(place, name) for place, name in last.items())


def _evaluate(function: Callable, arguments: tuple, visit: Visit):
    """What `function` returns, with each marked value replaced by `visit(name, value)`."""
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    results = _run(closed.jaxpr, closed.consts, jax.tree.leaves(arguments), visit)
    return jax.tree.unflatten(jax.tree.structure(shape), results)


def _run(jaxpr, constants: list, arguments: list, visit: Visit) -> list:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))

    def read(variable):
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        given = [read(variable) for variable in equation.invars]
        if equation.primitive.name == "name":
            results = [visit(equation.params["name"], given[0])]
        elif equation.primitive.name in _CALLS:
            inner = equation.params["jaxpr"]
            results = _run(inner.jaxpr, inner.consts, given, visit)
        elif equation.primitive.name in _REMAT:
            results = _run(equation.params["jaxpr"], [], given, visit)
        else:
            results = _alone(jaxpr, equation, given)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _alone(jaxpr, equation, given: list) -> list:
    """The results of one equation of `jaxpr` for its `given` inputs."""
    is_input = [not isinstance(variable, Literal) for variable in equation.invars]
    single = jaxpr.replace(
        constvars=[],
        invars=list(itertools.compress(equation.invars, is_input)),
        outvars=list(equation.outvars),
        eqns=[equation],
    )
    return jaxpr_as_fun(ClosedJaxpr(single, []))(*itertools.compress(given, is_input))
