"""Training a classifier: the one update that natural training, warm-up and hardening share."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from moth_jax.data.augmentation import augment
from moth_jax.data.dataset import ImageDataset
from moth_jax.data.sampling import epoch_batches
from moth_jax.errors import InputError, require_choice
from moth_jax.evaluation import Adversary, accuracy, check_loss, pgd
from moth_jax.models import Classifier
from moth_jax.models.classifier import complete
from moth_jax.options import (
    AT_LEAST_1,
    BELOW_1,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    check_options,
    option,
)
from moth_jax.parallel.devices import constrain, constrain_replicated, read_batches, replicate
from moth_jax.progress import Progress, as_progress
from moth_jax.types import Variables

BATCH_NORM_MODES = ("update", "frozen")


@flax.struct.dataclass
class TrainState:
    """A model in training.

    Attributes:
      variables: {"params": ..., "batch_stats": ...}.
      opt_state: the optimiser's state, for the parameters.
    """

    variables: Variables
    opt_state: optax.OptState


NO_ADVERSARY = Adversary()
# The adversaries of the paper's adversarial training (Section V-A), by the name of the data set.
PUBLISHED_ADVERSARIES = {
    "cifar10": Adversary(8 / 255, 2 / 255, 7),
    "svhn": Adversary(0.03, 0.005, 8),
    "gtsrb": Adversary(0.03, 0.005, 8),
    "lisa": Adversary(0.1, 0.02, 8),
}


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Natural training, or adversarial with an adversary; from scratch or of a given model.

    Attributes:
      epochs: passes over the training images.
      batch_size: images per step.
      learning_rate: its peak. It rises over the first twentieth of the steps, then falls as a
        cosine.
      momentum: of Nesterov SGD.
      weight_decay: gradient 2 * weight_decay * kernel; other parameters have no decay.
      augment: flips and shifts, as the data set allows.
      batch_norm: "update" normalises by each batch. "frozen" normalises by the running statistics,
        for a given model whose statistics must not or cannot be updated.
      adversary: PGD on every batch.
      seed: of the order of the images, of augmentation and of PGD's start.
    """

    epochs: int = option(30, AT_LEAST_1)
    batch_size: int = option(128, AT_LEAST_1)
    learning_rate: float = option(0.1, POSITIVE)
    momentum: float = option(0.9, BELOW_1)
    weight_decay: float = option(2.5e-4, NOT_NEGATIVE)
    augment: bool = True
    batch_norm: str = "update"
    adversary: Adversary = NO_ADVERSARY
    seed: int = option(0, SEED)

    def __post_init__(self):
        check_options(self)


def sgd(
    learning_rate: float | optax.Schedule, *, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """Return Nesterov SGD with an L2 penalty `weight_decay` * |w|^2 on kernels only."""

    def kernels(params):
        return {name: value.ndim > 1 for name, value in params.items()}

    return optax.chain(
        optax.add_decayed_weights(2 * weight_decay, mask=kernels),
        optax.sgd(learning_rate, momentum=momentum, nesterov=True),
    )


def optimiser(config: TrainingConfig, num_images: int) -> optax.GradientTransformation:
    """Return the optimiser of a training on `num_images` images."""
    total = config.epochs * steps_per_epoch(config, num_images)
    rising = min(max(1, total // 20), total - 1)  # a single step does not rise
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, rising, total)
    return sgd(schedule, momentum=config.momentum, weight_decay=config.weight_decay)


def steps_per_epoch(config: TrainingConfig, num_images: int) -> int:
    """Return the number of steps in an epoch; images left over are fewer than a batch."""
    return max(1, num_images // config.batch_size)


def check_batch_norm(classifier: Classifier, batch_norm: str) -> None:
    """Raise `InputError` if this classifier cannot be trained with that mode."""
    require_choice("batch_norm mode", batch_norm, BATCH_NORM_MODES)
    if batch_norm == "update" and classifier.frozen:
        raise InputError(
            f"batch_norm 'update' is impossible for this {classifier.spec.arch}: "
            f"{classifier.frozen}; use batch_norm 'frozen'"
        )


def make_update(
    classifier: Classifier,
    tx: optax.GradientTransformation,
    *,
    batch_norm: str = "update",
    loss_fn: Callable[..., tuple[Array, Variables]] | None = None,
) -> Callable[..., tuple[TrainState, Array]]:
    """Return update(state, images [n, h, w, c], labels [n], *more) -> (state, loss).

    Args:
      classifier: the model.
      tx: the optimiser.
      batch_norm: "update" normalises by the batch and moves the running statistics; "frozen" uses
        the running statistics as they are.
      loss_fn: (variables, images, labels, *more) -> (loss, variables with the statistics
        afterwards); the mean cross-entropy if None.
    """
    check_batch_norm(classifier, batch_norm)

    def cross_entropy(variables, images, labels):
        if batch_norm == "update":
            logits, variables = classifier.forward_train(variables, images)
        else:
            logits = classifier.predict(variables, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), variables

    def loss_of(params, batch_stats, *batch):
        variables = {"params": params, "batch_stats": batch_stats}
        loss, variables = (cross_entropy if loss_fn is None else loss_fn)(variables, *batch)
        return loss, variables["batch_stats"]

    def update(state: TrainState, images, labels, *more) -> tuple[TrainState, Array]:
        batch = (*constrain((images, labels)), *more)
        params, batch_stats = state.variables["params"], state.variables["batch_stats"]
        (loss, batch_stats), gradient = jax.value_and_grad(loss_of, has_aux=True)(
            params, batch_stats, *batch
        )
        updates, opt_state = tx.update(gradient, state.opt_state, params)
        params = optax.apply_updates(params, updates)
        variables = {**state.variables, "params": params, "batch_stats": batch_stats}
        state = TrainState(variables, opt_state)
        # What goes in comes out alike: a state placed otherwise would be compiled for again.
        return constrain_replicated(state), loss

    return update


class Place(NamedTuple):
    """How far a training is.

    Attributes:
      epoch: epochs done.
      state: the model.
      losses: of the steps done in the epoch that has begun.
    """

    epoch: int
    state: TrainState
    losses: Sequence[Array] | np.ndarray = ()


def train(
    classifier: Classifier,
    variables: Variables,
    dataset: ImageDataset,
    config: TrainingConfig,
    *,
    start: Place | None = None,
    on_step: Callable[[int, TrainState, tuple[Array, ...]], None] | None = None,
    on_epoch: Callable[[int, TrainState, dict], None] | None = None,
    progress: bool | Progress = True,
) -> Variables:
    """Train a classifier on `dataset.train`.

    Args:
      classifier, variables: the model and where it starts.
      dataset: the images.
      config: the options.
      start: where an interrupted training goes on: what `on_step` was last given, or `on_epoch`.
      on_step: called after each step but an epoch's last with the fields of its `Place`.
      on_epoch: called with the number of epochs done, the state and its figures (`loss`,
        `validation_accuracy`), before the progress advances.
      progress: as in `distance.distance_matrix`.

    Returns:
      The trained variables.

    Raises:
      InputError: a loss is not finite. It is found at the end of the epoch.
    """
    tx = optimiser(config, len(dataset.train))
    if start is None:
        start = Place(0, TrainState(variables, tx.init(variables["params"])))
    first_epoch, state, first_losses = start
    state: TrainState = replicate(state)
    step_fn = _make_train_step(classifier, tx, dataset, config)
    with as_progress(progress).task(
        "training", total=config.epochs, unit="epochs", completed=first_epoch
    ) as task:
        for epoch in range(first_epoch, config.epochs):
            rng = np.random.default_rng([config.seed, epoch])
            epoch_key = jax.random.fold_in(jax.random.key(config.seed), epoch)
            losses, first_losses = list(first_losses), ()
            before = state.variables
            batch_size = min(config.batch_size, len(dataset.train))
            order = epoch_batches(len(dataset.train), batch_size, rng, drop_last=True)
            images_left = read_batches(dataset.train, order[len(losses) :])
            for i, images in enumerate(images_left, start=len(losses)):
                labels = dataset.train.labels[order[i]]
                state, loss = step_fn(state, images, labels, jax.random.fold_in(epoch_key, i))
                losses.append(loss)
                if on_step is not None and i + 1 < len(order):
                    on_step(epoch, state, tuple(losses))
            losses = np.asarray(jax.device_get(losses))
            _check_losses(losses, epoch, classifier, before, dataset)
            figures = {
                "loss": float(np.mean(losses)),
                "validation_accuracy": accuracy(
                    classifier.predict, state.variables, dataset.validation
                ),
            }
            if on_epoch is not None:
                on_epoch(epoch + 1, state, figures)
            task.advance(1, **figures)
    return state.variables


def _check_losses(
    losses: np.ndarray,
    epoch: int,
    classifier: Classifier,
    variables: Variables,
    dataset: ImageDataset,
) -> None:
    """Raise `InputError` at the first loss of an epoch's steps that is not finite.

    `variables` are those with which the epoch began.
    """
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        where = f"step {bad[0]} of epoch {epoch + 1} of the training"
        loss = float(losses[bad[0]])
        check_loss(loss, where, classifier.predict, variables, dataset.train)


def _make_train_step(
    classifier: Classifier,
    tx: optax.GradientTransformation,
    dataset: ImageDataset,
    config: TrainingConfig,
) -> Callable[..., tuple[TrainState, Array]]:
    """Return the jitted step(state, images, labels, key) -> (state, loss)."""
    update = make_update(classifier, tx, batch_norm=config.batch_norm)
    flip, shift = (dataset.flip, dataset.shift) if config.augment else (False, 0)

    @jax.jit
    def step(state: TrainState, images: Array, labels: Array, key: Array):
        augment_key, attack_key = jax.random.split(key)
        images = augment(jnp.asarray(images), augment_key, flip=flip, shift=shift, fill="zero")
        images = perturb(classifier, state.variables, images, labels, attack_key, config.adversary)
        return update(state, images, labels)

    return step


def perturb(
    classifier: Classifier,
    variables: Variables,
    images: Array,
    labels: Array,
    key: Array,
    adversary: Adversary,
) -> Array:
    """Return a batch [n, h, w, c], perturbed by the adversary against the model in inference mode.

    Without an adversary (epsilon 0) it is the batch itself.
    """
    images = constrain(images)
    if adversary.epsilon == 0:
        return images
    return pgd(classifier.predict, variables, images, labels, key, adversary=adversary)


def train_state_arrays(state: TrainState) -> dict:
    """Return a `TrainState` as a tree of arrays with string keys."""
    leaves = jax.tree.leaves(state.opt_state)
    return {
        "variables": state.variables,
        "opt_state": {f"{i:04d}": leaf for i, leaf in enumerate(leaves)},
    }


def outline(variables: Variables, tx: optax.GradientTransformation) -> dict:
    """Return the shapes and dtypes of `train_state_arrays` of a model with these variables."""
    return jax.eval_shape(
        lambda: train_state_arrays(TrainState(variables, tx.init(variables["params"])))
    )


def train_state_from_arrays(arrays: dict, tx: optax.GradientTransformation) -> TrainState:
    """Return the `TrainState` that `train_state_arrays` took apart.

    `tx` is an optimiser whose state has the same structure.
    """
    variables = complete(arrays["variables"])
    structure = jax.tree.structure(jax.eval_shape(tx.init, variables["params"]))
    leaves = [arrays["opt_state"][name] for name in sorted(arrays["opt_state"])]
    return TrainState(variables, jax.tree.unflatten(structure, leaves))
