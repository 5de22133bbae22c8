"""Classifiers: one file per family, one line in `MODELS` per architecture."""

from functools import partial

from flax import nnx

from moth_jax.errors import require_choice
from moth_jax.models.cnn import SmallCNN
from moth_jax.models.functional import Classifier, ModelSpec, Variables, from_module
from moth_jax.models.resnet import CifarResNet, PreactResNet

__all__ = ["MODELS", "Classifier", "ModelSpec", "Variables", "build", "create", "outline"]


def _resnet(family, blocks_per_stage, spec, rngs):
    return family(
        blocks_per_stage,
        num_classes=spec.num_classes,
        channels=spec.image_shape[-1],
        rngs=rngs,
    )


def _small_cnn(spec, rngs):
    return SmallCNN(num_classes=spec.num_classes, image_shape=spec.image_shape, rngs=rngs)


MODELS = {
    "resnet20": partial(_resnet, CifarResNet, 3),  # of depth 6 n + 2
    "resnet32": partial(_resnet, CifarResNet, 5),
    "resnet44": partial(_resnet, CifarResNet, 7),
    "resnet56": partial(_resnet, CifarResNet, 9),
    "resnet110": partial(_resnet, CifarResNet, 18),
    "preact_resnet20": partial(_resnet, PreactResNet, 3),
    "small_cnn": _small_cnn,
}


def build(spec: ModelSpec, *, seed: int = 0) -> tuple[Classifier, Variables]:
    """The classifier that `spec` describes, with fresh random weights.

    >>> spec = ModelSpec("small_cnn", 10, (8, 8, 1), mean=(0.3,), std=(0.4,))
    >>> classifier, variables = build(spec)
    >>> variables["params"]["head.kernel"].shape
    (256, 10)
    """
    return from_module(_module(spec, seed), spec)


def outline(spec: ModelSpec) -> tuple[Classifier, Variables]:
    """As `build`, with `jax.ShapeDtypeStruct` for arrays: to be filled with weights from a file.

    Drawing random weights only to replace them takes seconds, most of it compilation.
    """
    return from_module(nnx.eval_shape(lambda: _module(spec, 0)), spec)


def _module(spec, seed):
    require_choice("model", spec.arch, MODELS)
    return MODELS[spec.arch](spec, nnx.Rngs(seed))


def create(
    arch: str,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    class_names: tuple[str, ...] = (),
    seed: int = 0,
) -> tuple[Classifier, Variables]:
    """A classifier of a named architecture and its randomly initialised variables.

    `arch` is a key of `MODELS`; the rest is as in `ModelSpec`. Raises `InputError` for an unknown
    architecture or values that do not fit together.
    """
    spec = ModelSpec(arch, num_classes, image_shape, mean, std, class_names)
    return build(spec, seed=seed)
