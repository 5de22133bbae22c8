"""The standard search: an ensemble without options, by which distances are reported.

One search ends in one of many local minima, and which kind of search finds the smallest trigger
depends on the model. So several are made, and the smallest trigger counts:

1. A trigger that is added is searched (`added.TrimmedAddition`), from large changes and from small
   ones, with several seeds.
2. The best of these go on as masks and patterns (`Trimmed`); the others are dropped.
3. Where other directions to the same target are measured, their triggers are starts as well, beside
   the direction's own; and again, as long as that makes its trigger smaller.

How far the searches of a direction are apart, and whether the last pass still found a smaller
trigger, say how much a distance can be trusted.
"""

import dataclasses
import functools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moth_jax.inversion.added import TrimmedAddition
from moth_jax.inversion.base import Budget, InversionResult, Samples
from moth_jax.inversion.candidates import where
from moth_jax.inversion.directions import for_each_run, run_keys
from moth_jax.inversion.loop import invert
from moth_jax.inversion.trimmed import Trimmed
from moth_jax.options import POSITIVE_SHARE, check_options, option
from moth_jax.triggers import Trigger, replacing
from moth_jax.types import LogitsFn, Variables


class Beginning(NamedTuple):
    """How the search for an added trigger begins: uniform in ±scale, with this λ."""

    scale: float
    mask_weight: float


FROM_LARGE, FROM_SMALL = Beginning(1.0, 0.001), Beginning(0.1, 0.02)
BEGINNINGS = (FROM_LARGE, FROM_SMALL, FROM_SMALL)
NUM_KEPT = 2  # of the beginnings
NUM_NEIGHBOURS = 2  # triggers of other directions that a pass goes on from, beside its own
NUM_PASSES = 2  # at most, after the first
SETTLED = 0.98  # of the size before: a pass that finds no smaller trigger ends the search
ADDING = Budget(num_steps=100, minibatch_size=10, mask_weight=0.0)  # a beginning has its own λ
MASKING = Budget(num_steps=50, minibatch_size=10, mask_weight=0.02, steps_before=50)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standard:
    """The standard search of a distance. It has no options but what a distance is.

    Attributes:
      success_bound: share of the samples that must be sent to the target, in (0, 1].

    Raises:
      InputError: the bound is out of its range.
    """

    success_bound: float = option(0.9, POSITIVE_SHARE)

    method: ClassVar[str] = "standard"
    version: ClassVar[str] = "standard-1"
    budget: ClassVar[None] = None  # its own

    def __post_init__(self):
        check_options(self)

    @property
    def name(self) -> str:
        """The version with the bound: two of one name do the same."""
        return f"{self.version}({self.success_bound})"

    @property
    def adding(self) -> TrimmedAddition:
        """The method of the first searches."""
        return TrimmedAddition(success_bound=self.success_bound, start_scale=1.0)

    @property
    def masking(self) -> Trimmed:
        """The method of all others."""
        return Trimmed(success_bound=self.success_bound)


@functools.partial(jax.jit, static_argnames=("logits_fn", "inversion"))
def search(
    logits_fn: LogitsFn,
    variables: Variables,
    samples: Samples,
    victims: Array,
    seeds: Array,
    *,
    inversion: Standard,
) -> InversionResult:
    """Return the searches of D directions with S seeds: samples [D, ...] -> [D, S * NUM_KEPT].

    Args:
      logits_fn, variables: the model.
      samples: those of the directions.
      victims: [D], victim classes, which name the random numbers with target and seed.
      seeds: [S].
      inversion: the search.
    """
    num_directions, num_seeds = len(victims), len(seeds)
    scales, weights = (jnp.asarray(column) for column in zip(*BEGINNINGS, strict=True))
    # A seed of its own for each beginning.
    numbers = jnp.tile(jnp.arange(len(BEGINNINGS), dtype=seeds.dtype), num_seeds)
    own = jnp.repeat(seeds, len(BEGINNINGS)) * len(BEGINNINGS) + numbers
    of_runs = own, jnp.tile(scales, num_seeds), jnp.tile(weights, num_seeds)
    seeds_of, scales_of, weights_of = (jnp.tile(row, (num_directions, 1)) for row in of_runs)
    victims_of = jnp.tile(victims[:, None], (1, len(own)))
    runs = seeds_of, victims_of, scales_of, weights_of

    def add(logits_fn, variables, samples: Samples, run) -> tuple[Array, Trigger]:
        seed, victim, scale, mask_weight = run
        start_key, key = run_keys(seed, victim, samples.target)
        method = inversion.adding
        start = jax.tree.map(lambda v: scale * v, method.start(start_key, samples.image_shape))
        budget = dataclasses.replace(ADDING, mask_weight=mask_weight)
        found = invert(logits_fn, variables, samples, start, key, budget=budget, inversion=method)
        mask = replacing(found.trigger, _mean_image(samples))
        # Where none was found, as by the trimmed search alone.
        other = inversion.masking.start(start_key, samples.image_shape)
        return found.size, where(found.found, mask, other)

    sizes, starts = for_each_run(add, logits_fn, variables, samples, runs)
    by_seed = sizes.reshape(num_directions, num_seeds, -1)
    kept = jnp.argsort(by_seed, axis=-1)[..., :NUM_KEPT].reshape(num_directions, -1)
    first = len(BEGINNINGS) * jnp.repeat(jnp.arange(num_seeds), NUM_KEPT)
    kept += jnp.tile(first, (num_directions, 1))
    starts = jax.vmap(lambda tree, places: jax.tree.map(lambda v: v[places], tree))(starts, kept)
    return go_on(logits_fn, variables, samples, victims, starts, inversion=inversion)


@functools.partial(jax.jit, static_argnames=("logits_fn", "inversion"))
def go_on(
    logits_fn: LogitsFn,
    variables: Variables,
    samples: Samples,
    victims: Array,
    starts: Trigger,
    *,
    inversion: Standard,
) -> InversionResult:
    """Return the searches of D directions from R triggers each: starts [D, R, ...] -> [D, R]."""
    shape = jax.tree.leaves(starts)[0].shape[:2]

    def mask(logits_fn, variables, samples: Samples, run) -> InversionResult:
        start, number, victim = run
        _, key = run_keys(number, victim, samples.target)
        method = inversion.masking
        return invert(logits_fn, variables, samples, start, key, budget=MASKING, inversion=method)

    numbers = jnp.tile(jnp.arange(shape[1], dtype=jnp.uint32), (shape[0], 1))
    runs = starts, numbers, jnp.tile(victims[:, None], (1, shape[1]))
    return for_each_run(mask, logits_fn, variables, samples, runs)


def search_one(
    logits_fn: LogitsFn, variables: Variables, samples: Samples, seed: int, inversion: Standard
) -> InversionResult:
    """Return the smallest trigger of one direction, alone: `samples` without leading axes.

    It goes on once from the smallest trigger that it finds.
    """
    one = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], samples)
    victims = jnp.zeros(1, jnp.int32)
    model = logits_fn, variables, one, victims
    found = search(*model, jnp.asarray([seed], jnp.uint32), inversion=inversion)
    best = _smallest(found)
    starts = jax.tree.map(lambda leaf: leaf[None, None], best.trigger)
    later = go_on(*model, starts, inversion=inversion)
    return _smallest(jax.tree.map(lambda *v: jnp.concatenate(v, axis=1), found, later))


def _smallest(found: InversionResult) -> InversionResult:
    """Return the smallest of the searches [1, R] of one direction."""
    best = jnp.argmin(found.size[0])
    return jax.tree.map(lambda leaf: leaf[0, best], found)


def _mean_image(samples: Samples) -> Array:
    """Return the mean [h, w, c] of the images of one direction."""
    weights = samples.weights[:, None, None, None]
    return jnp.sum(weights * samples.images, axis=0) / jnp.maximum(jnp.sum(weights), 1.0)
