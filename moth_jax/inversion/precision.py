"""The model in bfloat16 while triggers are searched; what is verified is verified in float32.

Mask, pattern, Adam's averages and losses stay in float32: only the network's weights, images and
activations are rounded, which halves the bytes that a gradient moves. The last part of the budget
is in float32: a trigger that just reaches the success bound in bfloat16 often misses it when it is
verified.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from moth_jax.types import LogitsFn

ROUNDED_SHARE = 0.75  # of the budget
State = TypeVar("State")


def in_precision(
    update: Callable[[LogitsFn], State], logits_fn: LogitsFn, precision: str, progress: Array
) -> State:
    """Return `update` with `logits_fn` in `precision`, as due at this `progress` of the budget."""
    if precision == "float32":
        return update(logits_fn)
    return jax.lax.cond(
        progress < ROUNDED_SHARE,
        lambda: update(in_bfloat16(logits_fn)),
        lambda: update(logits_fn),
    )


def in_bfloat16(logits_fn: LogitsFn) -> LogitsFn:
    """Return `logits_fn` with its variables and images rounded to bfloat16, and float32 logits."""

    def rounded(leaf: Array) -> Array:
        return leaf.astype(jnp.bfloat16) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    def call(variables, images: Array) -> Array:
        return logits_fn(jax.tree.map(rounded, variables), rounded(images)).astype(images.dtype)

    return call
