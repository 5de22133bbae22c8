"""Classifiers: `MODELS` holds the architectures; `models.architectures` says what one is."""

from functools import partial

from flax import nnx

from moth_jax.errors import InputError, require_choice
from moth_jax.models.architectures.cnn import SmallCNN
from moth_jax.models.architectures.lisa_cnn import LisaCNN
from moth_jax.models.architectures.nin import NiN
from moth_jax.models.architectures.resnet import CifarResNet, PreactResNet
from moth_jax.models.architectures.torchvision_resnet import ResNet
from moth_jax.models.architectures.vgg import VGG
from moth_jax.models.classifier import (
    Classifier,
    ModelSpec,
    check_image_shape,
    check_normalisation,
    from_module,
)
from moth_jax.models.other_frameworks import from_function, like
from moth_jax.models.pytorch.classifier import from_graph
from moth_jax.models.values import check_values
from moth_jax.types import Variables

__all__ = [
    "MODELS",
    "Classifier",
    "ModelSpec",
    "Variables",
    "build",
    "create",
    "from_function",
    "from_torch",
    "like",
    "outline",
]


def _by_channels(family, spec, rngs):
    return family(num_classes=spec.num_classes, channels=spec.image_shape[-1], rngs=rngs)


def _by_shape(family, spec, rngs):
    return family(num_classes=spec.num_classes, image_shape=spec.image_shape, rngs=rngs)


def _cifar_resnet(depth):
    return partial(_by_channels, partial(CifarResNet, (depth - 2) // 6))


def _wide_resnet(depth, widening):
    family = partial(PreactResNet, (depth - 4) // 6, widening, as_torch=True)
    return partial(_by_channels, family)


def _resnet(depth, **options):
    return partial(_by_channels, partial(ResNet, depth, **options))


def _vgg(depth, **options):
    return partial(_by_shape, partial(VGG, depth, **options))


MODELS = {
    **{f"resnet{depth}": _cifar_resnet(depth) for depth in (20, 32, 44, 56, 110)},
    "preact_resnet20": partial(_by_channels, partial(PreactResNet, 3)),
    "wrn16_1": _wide_resnet(16, 1),
    "wrn28_10": _wide_resnet(28, 10),
    **{f"resnet{depth}": _resnet(depth) for depth in (18, 34, 50, 101)},
    "wide_resnet50_2": _resnet(50, widening=2),
    "resnet18_cifar": _resnet(18, small_stem=True),
    "vgg11_bn": _vgg(11, grid=7, hidden=(4096, 4096)),
    "vgg13_bn": _vgg(13, grid=7, hidden=(4096, 4096)),
    "vgg19": _vgg(19, grid=1),  # for CIFAR
    "nin": partial(_by_channels, NiN),
    "lisa_cnn": partial(_by_shape, LisaCNN),
    "small_cnn": partial(_by_shape, SmallCNN),
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
    if spec.graph is not None:
        return from_graph(spec.graph, spec)
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


def from_torch(model, *, image_shape, mean, std, **options) -> tuple[Classifier, Variables]:
    """A PyTorch module or program as a classifier: `pytorch.export.from_torch`. Needs torch.

    A `Program`, which `pytorch.programs.read_program` reads from a file, needs no torch.
    Raises `InputError` also for numbers that no trained model has (`values.check_values`).
    """
    from moth_jax.models.pytorch.programs import Program, from_program

    check_image_shape(image_shape)
    for name, values in (("mean", mean), ("std", std)):
        if values is None:
            raise InputError(
                f"{name} must be given, one number per channel: what images in [0, 1] are "
                "normalised with before the model; mean 0 and std 1 if it takes them as they are"
            )
    check_normalisation(mean, std, image_shape[-1])
    if isinstance(model, Program):
        convert = from_program
    else:
        from moth_jax.models.pytorch.export import from_torch as convert
    classifier, variables = convert(model, image_shape=image_shape, mean=mean, std=std, **options)
    check_values({**variables["params"], **variables["batch_stats"]}, classifier.spec.arch)
    return classifier, variables
