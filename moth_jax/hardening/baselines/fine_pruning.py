"""Fine-pruning (Liu et al., RAID 2018): cut channels that clean images leave idle, then train."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moth_jax.data.dataset import ImageDataset
from moth_jax.errors import InputError
from moth_jax.hardening import base
from moth_jax.hardening.base import HardeningConfig, Method
from moth_jax.hardening.baselines.stages import (
    BaselineState,
    Stages,
    as_method,
    draw,
    make_plain_update,
)
from moth_jax.models import Classifier
from moth_jax.models.features import stages as feature_stages
from moth_jax.models.features import with_features, with_replaced
from moth_jax.options import POSITIVE, SHARE, option
from moth_jax.training import TrainState
from moth_jax.types import Variables

_BATCH = 256
_PROBES = 64


@dataclasses.dataclass(frozen=True)
class FinePruningConfig(HardeningConfig):
    """Options of fine-pruning.

    Attributes:
      max_prune_drop: bound of the fall in validation accuracy, as a share of 1, while channels are
        cut.
    """

    learning_rate: float = option(1e-2, POSITIVE)
    max_accuracy_drop: float = option(1.0, SHARE)
    max_prune_drop: float = option(0.04, SHARE)


def check_fit(
    classifier: Classifier, variables: Variables, dataset: ImageDataset, config: FinePruningConfig
) -> None:
    """Raise `InputError` if model, data and options do not fit, or no channels can be cut."""
    base.check_fit(classifier, variables, dataset, config)
    stage = feature_stages(classifier, variables)[-1]
    image = jax.ShapeDtypeStruct((1, *classifier.spec.image_shape), jnp.float32)
    maps = jax.eval_shape(with_features(classifier.predict), variables, image)[1][stage]
    every_other = np.arange(maps.shape[-1]) % 2 == 1
    weights_to_keep(classifier, variables, dataset, every_other)


@functools.partial(as_method, check=check_fit)
def harden(
    classifier: Classifier, variables: Variables, dataset: ImageDataset, config: FinePruningConfig
) -> Stages:
    """Cut the channels of the last stage that are least active, then train; as `moth.harden`.

    A channel is cut by setting to zero the weights that read it, and they stay zero.

    Raises:
      InputError: also where the model marks no feature maps (`models.features`), or its channels
        cannot be cut by weights alone.

    Note: The accuracy bound is off by default: pruning has a bound of its own.
    """
    del variables
    tx = base.optimiser(config, dataset)
    plain_update = make_plain_update(classifier, dataset, config, tx)

    @jax.jit
    def update(train: TrainState, keep: dict, batch) -> tuple[TrainState, Array]:
        train, loss = plain_update(train, batch)
        return dataclasses.replace(train, variables=_cut(train.variables, keep)), loss

    def prepare(state: BaselineState, index: int) -> tuple[BaselineState, dict]:
        given = state.train.variables
        cut = channels_to_cut(classifier, given, dataset, config)
        keep = weights_to_keep(classifier, given, dataset, cut)
        train = dataclasses.replace(state.train, variables=_cut(given, keep))
        figures = {"num_cut": int(cut.sum()), "num_channels": len(cut)}
        return dataclasses.replace(state, train=train, memory=keep), figures

    def step(state: BaselineState, index: int) -> tuple[BaselineState, dict]:
        train, loss = update(state.train, state.memory, draw(dataset, config, index))
        return dataclasses.replace(state, train=train), {"loss": float(loss)}

    return Stages(tx=tx, step=step, prepare=prepare, num_prepare=1)


def _cut(variables: Variables, keep: dict[str, Array]) -> Variables:
    params = {
        name: value * keep[name] if name in keep else value
        for name, value in variables["params"].items()
    }
    return {**variables, "params": params}


def channels_to_cut(
    classifier: Classifier, variables: Variables, dataset: ImageDataset, config: FinePruningConfig
) -> np.ndarray:
    """Return [C] bool, which channels of the last stage are cut.

    Channels are cut one after the other, the ones that clean training images activate least first,
    while validation accuracy has fallen by at most `max_prune_drop`.
    """
    stage = feature_stages(classifier, variables)[-1]
    maps_of = jax.jit(lambda v, x: with_features(classifier.predict)(v, x)[1][stage])
    activities = (
        np.asarray(maps_of(variables, images)).mean((1, 2)).sum(0)
        for images in dataset.train.batches(_parts(len(dataset.train)))
    )
    total = functools.reduce(np.add, activities)
    validation = [
        (images, np.asarray(maps_of(variables, images)))
        for images in dataset.validation.batches(_parts(len(dataset.validation)))
    ]
    read = _reader(classifier, stage)

    def accuracy(keep: np.ndarray) -> float:
        predicted = [
            np.argmax(read(variables["params"], variables, images, maps * keep), 1)
            for images, maps in validation
        ]
        return float(np.mean(np.concatenate(predicted) == dataset.validation.labels))

    order, keep = np.argsort(total, kind="stable"), np.ones(len(total), np.float32)
    lowest = accuracy(keep) - config.max_prune_drop - 1e-9
    for channel in order[:-1]:  # the last one stays: a model needs a channel
        keep[channel] = 0
        if accuracy(keep) < lowest:
            keep[channel] = 1
            break
    return keep == 0


def _parts(count: int) -> list[np.ndarray]:
    return [np.arange(first, min(first + _BATCH, count)) for first in range(0, count, _BATCH)]


def _reader(classifier: Classifier, stage: str) -> Callable[..., Array]:
    """Return (params, variables, images, maps of `stage` [n, h, w, c]) -> logits.

    Compiled, it computes of the images only what bypasses the stage.
    """

    @jax.jit
    def read(params, variables, images, maps):
        function = with_replaced(classifier.predict, stage, lambda _: maps)
        return function({**variables, "params": params}, images)

    return read


def weights_to_keep(
    classifier: Classifier, variables: Variables, dataset: ImageDataset, cut: np.ndarray
) -> dict[str, Array]:
    """Return, for every parameter that reads a channel in `cut` [C]: 0 where it does, else 1.

    A weight reads a channel if its gradient vanishes when the channel is 0. Random feature maps
    are used, because the maps of real images may never activate the channel.

    Raises:
      InputError: the model with those weights at 0 gives other logits than the model with the
        channels at 0.
    """
    stage = feature_stages(classifier, variables)[-1]
    read = _reader(classifier, stage)
    images = jnp.asarray(dataset.train.batch(np.arange(min(_PROBES, len(dataset.train)))))
    maps = with_features(classifier.predict)(variables, images)[1][stage]
    probe_key, weight_key = jax.random.split(jax.random.key(0))
    probes = jax.random.normal(probe_key, (_PROBES, *maps.shape[1:]))
    blank = jnp.zeros((_PROBES, *images.shape[1:]))
    weights = jax.random.normal(weight_key, (_PROBES, classifier.spec.num_classes))

    def projected(params, maps):
        return jnp.sum(read(params, variables, blank, maps) * weights)

    left = jnp.asarray(~cut, maps.dtype).reshape(1, 1, 1, -1)
    whole = jax.grad(projected)(variables["params"], probes)
    without = jax.grad(projected)(variables["params"], probes * left)
    reads = {name: (whole[name] != 0) & (without[name] == 0) for name in whole}
    keep = {name: 1.0 - mask for name, mask in reads.items() if mask.any()}
    expected = read(variables["params"], variables, images, maps * left)
    found = classifier.predict(_cut(variables, keep), images)
    if not np.allclose(expected, found, rtol=1e-3, atol=1e-3 * float(jnp.abs(expected).max())):
        raise InputError(
            f"the channels of {stage!r} in {classifier.spec.arch} cannot be cut by setting weights "
            "to 0; mark another feature map as the last one (moth_jax.models.features)"
        )
    return keep


METHOD = Method(harden, FinePruningConfig, BaselineState, check=check_fit)
