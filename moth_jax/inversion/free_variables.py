"""The free variables of a trigger: any real number stands for a value in [0, 1], as published."""

import jax
import jax.numpy as jnp

from moth_jax.triggers import Trigger

# m = tanh(θ) / SPAN + 1/2 maps the free variables onto [0, 1], as published.
SPAN = 2.0 - 1e-7


def to_trigger(theta: Trigger) -> Trigger:
    """Return the trigger of free variables `theta`: tanh(θ)/(2 - 1e-7) + 1/2, within [0, 1]."""
    return jax.tree.map(lambda v: jnp.clip(jnp.tanh(v) / SPAN + 0.5, 0.0, 1.0), theta)


def to_theta(trigger: Trigger) -> Trigger:
    """Return the free variables of `trigger`: the inverse of `to_trigger`."""
    return jax.tree.map(lambda v: jnp.arctanh((v - 0.5) * SPAN), trigger)
