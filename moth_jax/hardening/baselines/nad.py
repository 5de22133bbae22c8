"""NAD: neural attention distillation (Li et al., ICLR 2021)."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array

from moth_jax.data.dataset import ImageDataset
from moth_jax.hardening import base
from moth_jax.hardening.base import HardeningConfig, Method
from moth_jax.hardening.baselines.stages import (
    BaselineState,
    Batch,
    Stages,
    as_method,
    draw,
    make_plain_update,
    prepared_images,
)
from moth_jax.models import Classifier
from moth_jax.models.features import stages as feature_stages
from moth_jax.models.features import with_features
from moth_jax.options import NOT_NEGATIVE, POSITIVE, SHARE, option
from moth_jax.training import TrainState, make_update, sgd
from moth_jax.types import Variables

_STUDENT, _TEACHER = 0, 1  # purposes of randomness


@dataclasses.dataclass(frozen=True)
class NadConfig(HardeningConfig):
    """Options of attention distillation; published with 5 % of the training images.

    Attributes:
      epochs: of the student.
      learning_rate: of the first `high_epochs`; a tenth of it afterwards. `schedule` is not used.
      high_epochs: passes with the full learning rate, of teacher and student alike.
      teacher_epochs: passes over the images that turn the given model into the teacher.
      betas: weights of the attention maps of the last stages, in order; a model with fewer stages
        takes the last weights.
      weight_decay: 5e-5 is PyTorch's 1e-4 (`training.sgd`).
    """

    epochs: float = option(20.0, POSITIVE)
    max_accuracy_drop: float = option(1.0, SHARE)
    learning_rate: float = option(0.1, POSITIVE)
    weight_decay: float = option(5e-5, NOT_NEGATIVE)
    high_epochs: float = option(2.0, NOT_NEGATIVE)
    teacher_epochs: float = option(10.0, POSITIVE)
    betas: tuple[float, ...] = option((500.0, 1000.0, 1000.0), NOT_NEGATIVE)


def attention(features: Array) -> Array:
    """Return the maps [n, h*w] of features [n, h, w, c]: the sum of squares over c, of norm 1.

    >>> attention(jnp.asarray([[[[3.0]], [[0.0]]]])).tolist()
    [[1.0, 0.0]]
    """
    maps = jnp.square(features).sum(-1).reshape(features.shape[0], -1)
    return maps / jnp.maximum(jnp.linalg.norm(maps, axis=1, keepdims=True), 1e-12)


def check_fit(
    classifier: Classifier, variables: Variables, dataset: ImageDataset, config: NadConfig
) -> None:
    """Raise `InputError` if model, data and options do not fit, or no feature maps are marked."""
    base.check_fit(classifier, variables, dataset, config)
    feature_stages(classifier, variables)


@functools.partial(as_method, check=check_fit)
def harden(
    classifier: Classifier, variables: Variables, dataset: ImageDataset, config: NadConfig
) -> Stages:
    """Fine-tune a teacher, then train the given model to look where the teacher looks.

    Arguments and result as in `moth.harden`. The loss is cross-entropy and, for each of the last
    stages, β times the mean squared difference of the two models' attention maps.

    Raises:
      InputError: also where the model marks no feature maps (`models.features`).

    Note: The accuracy bound is off by default: with the published learning rate of 0.1 accuracy
      falls far before it comes back.
    """
    per_epoch = max(1, len(dataset.train) // config.batch_size)
    schedule = optax.piecewise_constant_schedule(
        config.learning_rate, {round(config.high_epochs * per_epoch): 0.1}
    )
    tx = sgd(schedule, momentum=config.momentum, weight_decay=config.weight_decay)
    teach = make_plain_update(classifier, dataset, config, tx)
    distil = _make_distillation(classifier, variables, dataset, config, tx)

    def prepare(state: BaselineState, index: int) -> tuple[BaselineState, dict]:
        train, loss = teach(state.train, draw(dataset, config, index, purpose=_TEACHER))
        return dataclasses.replace(state, train=train), {"loss": float(loss)}

    def begin(state: BaselineState) -> BaselineState:
        """Make the trained model the teacher, and the given one the student."""
        student = TrainState(state.kept, tx.init(state.kept["params"]))
        return dataclasses.replace(state, train=student, memory=_packed(state.train.variables))

    def step(state: BaselineState, index: int) -> tuple[BaselineState, dict]:
        batch = draw(dataset, config, index, purpose=_STUDENT)
        train, loss = distil(state.train, _unpacked(state.memory, state.kept), batch)
        return dataclasses.replace(state, train=train), {"loss": float(loss)}

    return Stages(
        tx=tx,
        step=step,
        prepare=prepare,
        num_prepare=max(1, round(config.teacher_epochs * per_epoch)),
        begin=begin,
    )


def _make_distillation(
    classifier: Classifier,
    variables: Variables,
    dataset: ImageDataset,
    config: NadConfig,
    tx: optax.GradientTransformation,
) -> Callable[[TrainState, Variables, Batch], tuple[TrainState, Array]]:
    """Return the compiled step(train, teacher, batch) -> (train, loss)."""
    names = feature_stages(classifier, variables)[-len(config.betas) :]
    betas = config.betas[-len(names) :]
    images_of = prepared_images(classifier, dataset, config)
    predict, forward = map(with_features, (classifier.predict, classifier.forward_train))

    def loss_fn(student, images, labels, taught) -> tuple[Array, Variables]:
        if config.batch_norm == "update":
            (logits, student), marked = forward(student, images)
        else:
            logits, marked = predict(student, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        distances = [
            beta * jnp.square(attention(marked[name]) - taught[name]).mean()
            for beta, name in zip(betas, names, strict=True)
        ]
        return losses.mean() + sum(distances), student

    update = make_update(classifier, tx, batch_norm=config.batch_norm, loss_fn=loss_fn)

    @jax.jit
    def distil(train: TrainState, teacher: Variables, batch: Batch) -> tuple[TrainState, Array]:
        images = images_of(train.variables, batch)
        _, marked = predict(teacher, images)
        return update(
            train, images, batch.labels, {name: attention(marked[name]) for name in names}
        )

    return distil


def _packed(variables: Variables) -> dict[str, Array]:
    """Return what training changes of the variables as one dict."""
    return {
        f"{kind}:{name}": value
        for kind in ("params", "batch_stats")
        for name, value in variables[kind].items()
    }


def _unpacked(memory: dict[str, Array], rest: Variables) -> Variables:
    """Return the variables that `_packed` took apart; collections that it left out are `rest`'s."""
    variables: Variables = {**rest, "params": {}, "batch_stats": {}}
    for path, value in memory.items():
        kind, _, name = path.partition(":")
        variables[kind][name] = value
    return variables


METHOD = Method(harden, NadConfig, BaselineState, check=check_fit)
