"""Spreading the work over devices: directions when measuring, samples when training.

    use_devices(4)                             # all there are, if it is not called
    images = read_batch(split, indices)        # cut among devices, each process reads its part
    result = over_directions(invert_one)(...)  # in `jit`: a vmap whose directions are cut

Directions are independent, so a sharded inversion needs no communication. A pair has only two: the
devices are then cut in two halves, and each half shares the samples of its direction. The mesh has
one axis for each prime factor of the number of devices, so that it can be cut at any of them; what
is cut among all devices is cut over all axes.

On a CPU the "devices" are threads: XLA runs most of a network's small operations on one core, and
one device per core (`use_all_cores`) keeps all of them busy. Several processes (`processes`) have
their devices in one mesh, each a part of it that is contiguous.

Note: `jax.pmap` is in maintenance; data parallelism in JAX is `jit` with `NamedSharding`.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moth_jax.errors import InputError

_chosen = 0  # number of devices to use; 0 for all


def use_all_cores() -> None:
    """Make one CPU device of every core; must be called before JAX is first used.

    A library does not decide this: the command line does, and a notebook may. It has no effect
    where an accelerator is the default, or where the number was set before.
    """
    given = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    if given in (None, -1, 0):
        linux = hasattr(os, "sched_getaffinity")  # which knows how many cores we may use
        cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
        jax.config.update("jax_num_cpu_devices", cores)


def use_devices(count: int = 0) -> None:
    """Compute on `count` devices from now on, the same number in every process; 0 means all.

    Raises:
      InputError: there are fewer devices, or they cannot be shared out among the processes.
    """
    global _chosen
    present, processes = jax.device_count(), jax.process_count()
    if not 0 <= count <= present or count % processes:
        parts = "" if processes == 1 else f", a multiple of the {processes} processes"
        more = (
            "; JAX_NUM_CPU_DEVICES in the environment makes more of a CPU"
            if jax.default_backend() == "cpu"
            else ""
        )
        raise InputError(
            f"mesh.devices must be in 1..{present}{parts}, or 0 for all {present} that JAX sees "
            f"here ({jax.devices()[0].device_kind}), got {count}{more}"
        )
    if count != _chosen:
        _chosen = count
        # What was compiled for other devices, or names them.
        jax.clear_caches()
        for cached in (_mesh, _gather, _over):
            cached.cache_clear()


def num_devices() -> int:
    """Return how many devices the work is spread over."""
    return _chosen or jax.device_count()


@functools.cache
def _mesh() -> Mesh:
    per_process = num_devices() // jax.process_count()
    # Those of a process are neighbours: its part of an array is then one slice of it.
    devices = [
        device
        for process in range(jax.process_count())
        for device in jax.local_devices(process)[:per_process]
    ]
    factors = _prime_factors(len(devices))
    names = tuple(f"data{i}" for i in range(len(factors)))
    return Mesh(np.asarray(devices).reshape(factors), names)


def _prime_factors(number: int) -> list[int]:
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors


def _sharding(*axes) -> NamedSharding:
    return NamedSharding(_mesh(), PartitionSpec(*axes))


def _put(leaf, *axes):
    """Place an array of which this process has the whole."""
    sharding = _sharding(*axes)
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    # `device_put` would compare the array between all processes.
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda part: leaf[part])


def spread(tree):
    """Return `tree` on all devices, its leading axes cut among them.

    Arrays whose leading axis does not divide are replicated. With one device it only moves them.
    """
    if num_devices() == 1:
        return jax.device_put(tree)

    def place(leaf):
        cut = np.ndim(leaf) and len(leaf) % num_devices() == 0
        return _put(leaf, *([_mesh().axis_names] if cut else []))

    return jax.tree.map(place, tree)


def replicate(tree):
    """Return `tree` whole on every device; arrays that several processes share stay where they are.

    Arrays of the host must be the same in every process.
    """
    if num_devices() == 1:
        return jax.device_put(tree)

    def place(leaf):
        is_shared = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        return leaf if is_shared else _put(leaf)

    return jax.tree.map(place, tree)


def fetch(tree):
    """Return the arrays of `tree` as NumPy arrays, whole, in every process."""
    if jax.process_count() > 1:
        tree = _gather()(tree)
    return jax.device_get(tree)


@functools.cache  # else it would be compiled at every call
def _gather():
    return jax.jit(lambda tree: tree, out_shardings=_sharding())


def my_rows(count: int) -> slice:
    """Return which of `count` rows that are cut among the devices are this process's to provide.

    All, if they do not divide: the rows are then replicated.
    """
    if count % num_devices():
        return slice(0, count)
    mine = count // jax.process_count()
    return slice(mine * jax.process_index(), mine * (jax.process_index() + 1))


def from_my_rows(tree, count: int):
    """Return arrays of `count` rows cut among the devices, of which this process has `my_rows`."""
    if count % num_devices() or jax.process_count() == 1:
        return spread(tree)
    sharding = _sharding(_mesh().axis_names)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(
            sharding, np.asarray(leaf), (count, *leaf.shape[1:])
        ),
        tree,
    )


def spread_shapes(tree, count: int):
    """Return the shapes of `count` rows as those of `tree`, to lower what takes them `spread`."""

    def shape(leaf):
        sharding = None
        if num_devices() > 1:
            sharding = _sharding(*([] if count % num_devices() else [_mesh().axis_names]))
        return jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype, sharding=sharding)

    return jax.tree.map(shape, tree)


def read_batches(split, batches: Sequence[np.ndarray]) -> Iterator[jax.Array]:
    """Yield the images of an `ImageSplit` at each of `batches` of indices, cut among the devices.

    Every process reads only its own part of a batch.
    """
    counts = list(map(len, batches))
    mine = [indices[my_rows(len(indices))] for indices in batches]
    for images, count in zip(split.batches(mine), counts, strict=True):
        yield from_my_rows(images, count)


def read_batch(split, indices: np.ndarray) -> jax.Array:
    """Return the images at `indices`, as `read_batches` does."""
    return next(read_batches(split, [np.asarray(indices)]))


def constrain(tree):
    """Inside `jit`: tell the compiler to cut leading axes among the devices.

    They need not divide. The numbers are those of one device but for the order of sums.
    """
    if num_devices() == 1:
        return tree
    return jax.tree.map(lambda leaf: _constrain(leaf, _mesh().axis_names), tree)


def constrain_replicated(tree):
    """Inside `jit`: keep `tree` whole on every device, as `replicate` does."""
    if num_devices() == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, _sharding())


def _constrain(leaf, axes: tuple[str, ...]):
    if not leaf.ndim or not axes:
        return leaf
    return jax.lax.with_sharding_constraint(leaf, _sharding(axes))


def _direction_axes(num_directions: int) -> tuple[str, ...]:
    """Return as many of the mesh's axes as give each direction devices of its own."""
    names, sizes = _mesh().axis_names, _mesh().devices.shape
    count = 0
    while count < len(sizes) and math.prod(sizes[:count]) < num_directions:
        count += 1
    return names[:count]


def over_directions(function: Callable) -> Callable:
    """Inside `jit`: return `jax.vmap(function)` with the directions cut among the devices.

    Where there are more devices than directions, `over_samples` cuts those of each direction among
    its devices. Directions are repeated where they do not divide.
    """

    def mapped(*arguments):
        count = len(jax.tree.leaves(arguments)[0])
        if num_devices() == 1:
            return jax.vmap(function)(*arguments)
        axes = _direction_axes(count)
        groups = math.prod(_mesh().shape[name] for name in axes)
        filled = np.arange(count + -count % groups) % count
        arguments = jax.tree.map(
            lambda leaf: _constrain(leaf if len(filled) == count else leaf[filled], axes),
            arguments,
        )
        result = jax.vmap(function, spmd_axis_name=axes or None)(*arguments)
        return jax.tree.map(lambda leaf: leaf[:count], result)

    return mapped


def over_seeds(function: Callable) -> Callable:
    """Inside `jit`: return `function` (*direction, run) over D directions, each with S runs.

    Takes the directions' arrays [D, ...] and the runs' [D, S, ...]; the results are [D, S, ...].
    All are in one `over_directions`: a vmap within a vmap takes twice as long to trace.
    """

    def mapped(*arguments):
        *directions, runs = arguments
        shape = jax.tree.leaves(runs)[0].shape[:2]
        if shape[1] > 1:
            directions = jax.tree.map(lambda leaf: jnp.repeat(leaf, shape[1], 0), directions)
        runs = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), runs)
        result = over_directions(function)(*directions, runs)
        return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), result)

    return mapped


def over_samples(logits_fn, num_directions: int = 1):
    """Return `logits_fn` (variables, images) with the images cut among the devices.

    Of `num_directions` inverted by `over_directions` each has its own part of the devices.
    """
    if num_devices() == 1:
        return logits_fn
    axes = _mesh().axis_names[len(_direction_axes(num_directions)) :]
    return _over(axes, logits_fn) if axes else logits_fn


@functools.lru_cache(maxsize=64)  # the same function again is the same jit cache entry again
def _over(axes: tuple[str, ...], logits_fn):
    def sharded(variables, images):
        return logits_fn(variables, _constrain(images, axes))

    return sharded
