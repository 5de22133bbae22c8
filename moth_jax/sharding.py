"""Spreading directions over devices: one mesh axis, `data`.

Directions are independent, so a sharded inversion needs no communication. On a CPU the "devices"
are threads: XLA runs most of a network's small operations on one core, and one device per core
(`use_all_cores`) keeps all of them busy.

Note: `jax.pmap` is in maintenance; data parallelism in JAX is `jit` with `NamedSharding`.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def use_all_cores() -> None:
    """Make one CPU device of every core; must be called before JAX is first used.

    A library does not decide this: the command line does, and a notebook may. It has no effect
    where an accelerator is the default, or where the number was set before.
    """
    if jax.config.jax_num_cpu_devices in (None, -1, 0):
        linux = hasattr(os, "sched_getaffinity")  # which knows how many cores we may use
        cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
        jax.config.update("jax_num_cpu_devices", cores)


def num_devices() -> int:
    """Return how many devices directions are spread over."""
    return jax.device_count()


def _mesh() -> Mesh:
    return Mesh(np.asarray(jax.devices()), ("data",))


def spread(tree):
    """Return `tree` on all devices, its leading axes cut among them.

    Arrays whose leading axis does not divide are replicated. With one device it only moves them.
    """
    devices = num_devices()
    if devices == 1:
        return jax.device_put(tree)
    mesh = _mesh()

    def place(leaf):
        axes = ("data",) if np.ndim(leaf) and len(leaf) % devices == 0 else ()
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*axes)))

    return jax.tree.map(place, tree)


@functools.lru_cache(maxsize=64)  # the same function again is the same jit cache entry again
def over_samples(logits_fn):
    """Return `logits_fn` (variables, images) with the images cut among the devices.

    For fewer directions than devices, which `spread` would leave to one device or repeat on all.
    """
    devices = num_devices()
    if devices == 1:
        return logits_fn

    def sharded(variables, images):
        count = images.shape[0]
        padding = ((0, -count % devices),) + ((0, 0),) * (images.ndim - 1)
        return logits_fn(variables, constrain(jnp.pad(images, padding)))[:count]

    return sharded


def replicate(tree):
    """Return `tree` whole on every device."""
    if num_devices() == 1:
        return jax.device_put(tree)
    return jax.device_put(tree, NamedSharding(_mesh(), PartitionSpec()))


def constrain(tree):
    """Inside `jit`: tell the compiler to cut leading axes among the devices, as `spread` does."""
    devices = num_devices()
    if devices == 1:
        return tree

    def place(leaf):
        axes = ("data",) if leaf.ndim and leaf.shape[0] % devices == 0 else ()
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(_mesh(), PartitionSpec(*axes)))

    return jax.tree.map(place, tree)


def constrain_replicated(tree):
    """Inside `jit`: keep `tree` whole on every device, as `replicate` does."""
    if num_devices() == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(_mesh(), PartitionSpec()))
