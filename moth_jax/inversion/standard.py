"""The standard search: an ensemble without options, for distances that are to be tight.

One search ends in one of many local minima, and which kind of search finds the smallest trigger
depends on the model. So several are made, and the smallest trigger counts:

1. A trigger that is added is searched (`added.TrimmedAddition`), once from large changes and twice
   from small ones. The best two go on as masks and patterns; the other is dropped.
2. A mask and a pattern are searched from a faint random mask (`Trimmed`).

How far the searches end from each other says how much a distance can be trusted.
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
NUM_RUNS = len(BEGINNINGS)  # at once, of a direction and seed
ADDING = Budget(num_steps=100, minibatch_size=10, mask_weight=0.0)  # a beginning has its own λ
GOING_ON = Budget(num_steps=50, minibatch_size=10, mask_weight=0.02, steps_before=50)
PASSES = (  # over the samples of a direction, of all its searches
    len(BEGINNINGS) * ADDING.num_steps + NUM_KEPT * GOING_ON.num_steps + Trimmed.budget.num_steps
)


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
    """Return all searches of D directions with S seeds: samples [D, ...] -> [D, S·(NUM_KEPT + 1)].

    Args:
      logits_fn, variables: the model.
      samples: those of the directions.
      victims: [D], victim classes, which name the random numbers with target and seed.
      seeds: [S].
      inversion: the search.
    """
    function = functools.partial(_search_one, inversion=inversion)
    runs = jnp.tile(seeds, (len(victims), 1)), jnp.tile(victims[:, None], (1, len(seeds)))
    found = for_each_run(function, logits_fn, variables, samples, runs)
    return jax.tree.map(lambda leaf: leaf.reshape(len(victims), -1, *leaf.shape[3:]), found)


def _search_one(
    logits_fn: LogitsFn,
    variables: Variables,
    samples: Samples,
    run: tuple[Array, Array],
    *,
    inversion: Standard,
) -> InversionResult:
    """Return all searches [NUM_KEPT + 1] of one direction with one seed."""
    model, bound = (logits_fn, variables, samples), inversion.success_bound
    adding = TrimmedAddition(success_bound=bound, start_scale=1.0)
    masking = Trimmed(success_bound=bound)
    start_key, key = run_keys(*run, samples.target)
    mean_image = _mean_image(samples)

    def add(key: Array, beginning: Beginning) -> tuple[Array, Trigger]:
        start_key, key = jax.random.split(key)
        start = adding.start(start_key, samples.image_shape)
        start = jax.tree.map(lambda values: beginning.scale * values, start)
        budget = dataclasses.replace(ADDING, mask_weight=beginning.mask_weight)
        found = invert(*model, start, key, budget=budget, inversion=adding)
        # Where none was found, as by the trimmed search alone.
        other = masking.start(start_key, samples.image_shape)
        return found.size, where(found.found, replacing(found.trigger, mean_image), other)

    def go_on(key: Array, start: Trigger) -> InversionResult:
        return invert(*model, start, key, budget=GOING_ON, inversion=masking)

    add_key, go_on_key, mask_key = jax.random.split(key, 3)
    beginnings = jax.tree.map(lambda *values: jnp.asarray(values), *BEGINNINGS)
    sizes, starts = jax.vmap(add)(jax.random.split(add_key, len(BEGINNINGS)), beginnings)
    kept = jnp.argsort(sizes)[:NUM_KEPT]
    starts = jax.tree.map(lambda leaf: leaf[kept], starts)
    gone_on = jax.vmap(go_on)(jax.random.split(go_on_key, NUM_KEPT), starts)
    start = masking.start(start_key, samples.image_shape)
    masked = invert(*model, start, mask_key, budget=Trimmed.budget, inversion=masking)
    return jax.tree.map(
        lambda several, one: jnp.append(several, one[None], axis=0), gone_on, masked
    )


def search_one(
    logits_fn: LogitsFn, variables: Variables, samples: Samples, seed: int, inversion: Standard
) -> InversionResult:
    """Return the smallest trigger of one direction: `samples` without leading axes."""
    one = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], samples)
    inputs = one, jnp.zeros(1, jnp.int32), jnp.asarray([seed], jnp.uint32)
    found = search(logits_fn, variables, *inputs, inversion=inversion)
    best = jnp.argmin(found.size[0])
    return jax.tree.map(lambda leaf: leaf[0, best], found)


def _mean_image(samples: Samples) -> Array:
    """Return the mean [h, w, c] of the images of one direction."""
    weights = samples.weights[:, None, None, None]
    return jnp.sum(weights * samples.images, axis=0) / jnp.maximum(jnp.sum(weights), 1.0)
