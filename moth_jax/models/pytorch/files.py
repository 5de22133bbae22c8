"""Files of whole PyTorch modules. Needs torch.

Reading such a file can run code that it brings. Nothing here lets it: a module is unpickled with a
list of classes that may occur in it.
"""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path

import torch  # pyright: ignore[reportMissingImports]

from moth_jax.errors import InputError, first_line
from moth_jax.models.pytorch.saved import check_archive, check_numbers

# The classes that torchvision's classifiers consist of.
SAFE_CLASSES = {
    "torchvision.models.alexnet": "AlexNet",
    "torchvision.models.densenet": "DenseNet _DenseBlock _DenseLayer _Transition",
    "torchvision.models.googlenet": "GoogLeNet Inception InceptionAux BasicConv2d",
    "torchvision.models.inception": (
        "Inception3 InceptionA InceptionB InceptionC InceptionD InceptionE InceptionAux BasicConv2d"
    ),
    "torchvision.models.mnasnet": "MNASNet _InvertedResidual",
    "torchvision.models.mobilenetv2": "MobileNetV2 InvertedResidual",
    "torchvision.models.mobilenetv3": "MobileNetV3 InvertedResidual",
    "torchvision.models.resnet": "ResNet BasicBlock Bottleneck",
    "torchvision.models.shufflenetv2": "ShuffleNetV2 InvertedResidual",
    "torchvision.models.squeezenet": "SqueezeNet Fire",
    "torchvision.models.vgg": "VGG",
    "torchvision.models.efficientnet": "EfficientNet MBConv FusedMBConv",
    "torchvision.models.convnext": "ConvNeXt CNBlock LayerNorm2d",
    "torchvision.models.vision_transformer": "VisionTransformer Encoder EncoderBlock MLPBlock",
    "torchvision.ops.misc": "Conv2dNormActivation ConvNormActivation SqueezeExcitation Permute",
    "torchvision.ops.stochastic_depth": "StochasticDepth",
    "torch.nn.modules.activation": (
        "ReLU ReLU6 LeakyReLU GELU SiLU Sigmoid Softmax Hardsigmoid Hardswish Tanh ELU "
        "MultiheadAttention"
    ),
    "torch.nn.modules.batchnorm": "BatchNorm2d BatchNorm1d",
    "torch.nn.modules.container": "Sequential ModuleList ModuleDict",
    "torch.nn.modules.conv": "Conv2d",
    "torch.nn.modules.dropout": "Dropout Dropout2d",
    "torch.nn.modules.flatten": "Flatten",
    "torch.nn.modules.linear": "Linear Identity NonDynamicallyQuantizableLinear",
    "torch.nn.modules.normalization": "LayerNorm GroupNorm",
    "torch.nn.modules.pooling": "AdaptiveAvgPool2d AvgPool2d MaxPool2d",
}


def read_module(path: str | Path) -> "torch.nn.Module":
    """The module of a file that `torch.save(module, path)` wrote, of `SAFE_CLASSES` alone.

    Raises:
      InputError: it asks for other classes or functions (named), or is damaged.
    """
    path = Path(path)
    check_archive(path)
    refused = sorted(set(_globals_of(path)) - set(_safe_names()))
    if refused:
        raise InputError(
            f"{path} is refused: besides classes of torchvision it asks for {', '.join(refused)}; "
            "convert it where you trust it, with torch.save(module.state_dict(), FILE), and give "
            "the state_dict with a builder"
        )
    try:
        with torch.serialization.safe_globals(list(_safe_classes())):
            module = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(module, torch.nn.Module):
            numbers = sum(tensor.numel() for tensor in module.state_dict().values())
            check_numbers(path, numbers, path.stat().st_size)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(module, torch.nn.Module):
        raise InputError(
            f"{path} holds a {type(module).__name__}, not a module; read it as weights"
        )
    return module


def _globals_of(path: Path) -> list[str]:
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception as error:
        raise InputError(
            f"{path} is no PyTorch file, is damaged, or is of a format before 2020 "
            f"({first_line(error)})"
        ) from error


def _safe_names() -> list[str]:
    return [f"{module}.{name}" for module, names in SAFE_CLASSES.items() for name in names.split()]


def _safe_classes() -> Iterator[type]:
    """The classes of `SAFE_CLASSES` that the installed versions have."""
    for module, names in SAFE_CLASSES.items():
        with contextlib.suppress(ImportError):
            there = importlib.import_module(module)
            yield from (getattr(there, name) for name in names.split() if hasattr(there, name))
