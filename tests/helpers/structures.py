"""The architectures that are compared with PyTorch, one row each, and what is compared.

A row is converted by its `how`; a new way to convert is one function and one line in `CONVERT`.
"""

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moth_jax import models
from moth_jax.models import Classifier, ModelSpec
from moth_jax.models.weights import importing
from moth_jax.types import Variables
from tests.helpers.torch_models import (
    CifarResNet,
    CifarVGG19,
    LisaCNN,
    NiN,
    WideResNet,
    arrays,
    in_float64,
    to_torch,
    torch,
)
from tests.helpers.torchvision_shim import torchvision


class Structure(NamedTuple):
    """A PyTorch classifier and how it becomes one of ours."""

    name: str
    how: str  # a key of CONVERT
    build: Callable[..., torch.nn.Module]  # takes num_classes
    size: int = 224  # of the images whose logits are compared, in pixels
    small: int = 64  # of those whose gradients are, in float64
    num_classes: int = 10
    slow: bool = False
    options: tuple[tuple[str, object], ...] = ()  # for `build`

    def module(self) -> torch.nn.Module:
        """A new one."""
        return self.build(num_classes=self.num_classes, **dict(self.options))


def _small_stem(num_classes):
    """torchvision's ResNet18 with the usual first layers for CIFAR."""
    module = torchvision.models.resnet18(num_classes=num_classes)
    module.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    module.maxpool = torch.nn.Identity()
    return module


def _torchvision(name, *, slow=False):
    return Structure(name, "native", getattr(torchvision.models, name), slow=slow)


def _bridged(name, *, slow=True, **fields):
    return Structure(name, "bridge", getattr(torchvision.models, name), slow=slow, **fields)


def _small(name, build, num_classes=10, *, slow=False):
    return Structure(name, "native", build, 32, 32, num_classes, slow)


# Their weights are drawn anew anyway, and torchvision's way takes a minute.
_NO_AUXILIARY = (("aux_logits", False), ("init_weights", False))

STRUCTURES = [
    _small("resnet20", partial(CifarResNet, 3)),
    _small("resnet32", partial(CifarResNet, 5), slow=True),
    _small("wrn16_1", WideResNet),
    _small("wrn28_10", partial(WideResNet, 4, 10), slow=True),
    _small("nin", NiN),
    _small("vgg19", CifarVGG19, slow=True),
    _small("lisa_cnn", LisaCNN, 18),
    _small("resnet18_cifar", _small_stem, slow=True),
    _torchvision("resnet18"),
    _torchvision("resnet34", slow=True),
    _torchvision("resnet50", slow=True),
    _torchvision("resnet101", slow=True),
    _torchvision("wide_resnet50_2", slow=True),
    _torchvision("vgg11_bn", slow=True),
    _torchvision("vgg13_bn", slow=True),
    _bridged("squeezenet1_0"),
    _bridged("squeezenet1_1", slow=False),
    _bridged("densenet121"),
    _bridged("googlenet", options=_NO_AUXILIARY),
    _bridged("inception_v3", options=_NO_AUXILIARY, size=299, small=96),
    _bridged("mobilenet_v2"),
    _bridged("shufflenet_v2_x1_0"),
    _bridged("shufflenet_v2_x1_5"),
    _bridged("shufflenet_v2_x2_0"),
]


def as_native(
    structure: Structure, module: torch.nn.Module, size: int
) -> tuple[Classifier, Variables]:
    """Our own module of that name, with the weights of `module`, for images of `size` pixels."""
    layout = importing.LAYOUTS[structure.name]
    image_shape = (size, size, 3)
    spec = ModelSpec(structure.name, structure.num_classes, image_shape, layout.mean, layout.std)
    classifier, shapes = models.outline(spec)
    return classifier, importing.import_weights(spec, shapes, arrays(module))


def as_bridge(
    structure: Structure, module: torch.nn.Module, size: int
) -> tuple[Classifier, Variables]:
    """The module itself, through torch.export."""
    return models.from_torch(
        module,
        image_shape=(size, size, 3),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        name=structure.name,
    )


CONVERT = {"native": as_native, "bridge": as_bridge}


def random_images(count: int, size: int) -> np.ndarray:
    """Images [n h w 3] in [0,1], float32, always the same."""
    return np.random.default_rng(3).random((count, size, size, 3), np.float32)


@torch.no_grad()
def build_random(structure: Structure) -> torch.nn.Module:
    """The PyTorch module, evaluation mode, with random weights and batch-norm statistics.

    The statistics are near those that images give, as in a trained network: with others, signals
    would grow or vanish from layer to layer, and differences with them. Dropout is switched off.
    """
    torch.manual_seed(0)
    module = structure.module().train()
    norms = [m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for layer in module.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                torch.nn.init.normal_(layer.bias, std=0.1)
        elif isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    for norm in norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.normal_(norm.bias, std=0.2)
        norm.momentum = 1.0
    module(to_torch(random_images(8, structure.small), torch.float32))
    for norm in norms:
        norm.momentum = 0.1
        norm.running_mean += 0.2 * norm.running_var.sqrt() * torch.randn(norm.num_features)
        norm.running_var *= 0.5 + torch.rand(norm.num_features)
    return module.eval()


def largest_difference(ours, theirs) -> float:
    """The largest difference, relative to the largest value."""
    ours, theirs = (np.asarray(values, np.float64) for values in (ours, theirs))
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def logits_difference(structure: Structure, module: torch.nn.Module) -> float:
    """Of the logits in float32, at full size."""
    classifier, variables = CONVERT[structure.how](structure, module, structure.size)
    images = random_images(2, structure.size)
    with torch.no_grad():
        theirs = module(to_torch(images, torch.float32, classifier.spec))
    return largest_difference(jax.jit(classifier.predict)(variables, images), theirs)


def gradient_difference(structure: Structure, module: torch.nn.Module) -> float:
    """Of the gradient of a random combination of logits by the images, in float64, small."""
    classifier, variables = CONVERT[structure.how](structure, module, structure.small)
    images = random_images(2, structure.small)
    weights = np.random.default_rng(4).normal(size=(2, structure.num_classes))
    x = to_torch(images, torch.float64, classifier.spec).requires_grad_()
    module = copy.deepcopy(module).double()
    module.requires_grad_(False)
    (module(x) * torch.tensor(weights)).sum().backward()
    with jax.enable_x64(True):
        variables = in_float64(variables)

        def score(images):
            return (classifier.predict(variables, images) * weights).sum()

        ours = jax.jit(jax.grad(score))(jnp.asarray(images, jnp.float64))
    theirs = x.grad.numpy().transpose(0, 2, 3, 1) / np.array(classifier.spec.std)
    return largest_difference(ours, theirs)


def conversion_seconds(structure: Structure, module: torch.nn.Module) -> float:
    """Time from the module to variables on the device."""
    started = time.perf_counter()
    _, variables = CONVERT[structure.how](structure, module, structure.size)
    jax.block_until_ready(variables)
    return time.perf_counter() - started
