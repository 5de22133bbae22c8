"""PyTorch files that hold more than weights: exported programs and whole modules. Needs torch.

Reading such a file can run code that it brings. Nothing here lets it: of a program everything that
PyTorch would unpickle or evaluate is looked at first, and a module is unpickled with a list of
classes that may occur in it.
"""

import contextlib
import importlib
import io
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch  # pyright: ignore[reportMissingImports]

from moth_jax.errors import InputError, first_line

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
_OPERATOR = re.compile(r"torch\.ops\.aten\.\w+\.\w+|_operator\.\w+")
# What torch.export writes for the size of a batch and sums of it; the reader evaluates it.
_EXPRESSION = re.compile(
    r"(?:Symbol\('[su]\d+'(?:, \w+=True)*\)|[su]\d+|\d+|[-+*/(), ]"
    r"|Integer|Rational|Add|Mul|Pow|Max|Min|Mod|FloorDiv|CeilDiv|PythonMod|oo)*"
)


def read_program(path: str | Path) -> "torch.export.ExportedProgram":
    """The program of a `.pt2` file.

    Raises:
      InputError: it is damaged, of another kind, or would run code when read.
    """
    path = Path(path)
    try:
        _check_program(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(path)
    except InputError:
        raise
    except _FAULTS as error:
        raise InputError(
            f"{path} is no program of torch.export, or is damaged ({first_line(error)}); "
            "write it again with torch.export.save"
        ) from error


def read_module(path: str | Path) -> "torch.nn.Module":
    """The module of a file that `torch.save(module, path)` wrote, of `SAFE_CLASSES` alone.

    Raises:
      InputError: it asks for other classes or functions (named), or is damaged.
    """
    path = Path(path)
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
    except _FAULTS as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(module, torch.nn.Module):
        raise InputError(
            f"{path} holds a {type(module).__name__}, not a module; read it as weights"
        )
    return module


_FAULTS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    LookupError,
    OSError,
    EOFError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)


def _globals_of(path: Path) -> list[str]:
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except _FAULTS as error:
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


def _check_program(path: Path) -> None:
    """Refuse whatever PyTorch's reader of programs would unpickle freely or evaluate."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged:
            raise InputError(f"{path} is damaged: wrong checksum of {damaged}; get it again")
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith((".pt", ".pkl", ".pickle")):
                _check_pickle(path, name, content)
            elif name.endswith(".json"):
                _check_json(path, name, json.loads(content))
            elif not _is_plain(name):
                raise _refused(path, f"an unknown part {name}")


def _is_plain(name: str) -> bool:
    """Whether a part of the archive is read as numbers or text."""
    folder, _, base = name.rpartition("/")
    if folder.endswith(("data/weights", "data/constants")):
        return re.fullmatch(r"(weight|tensor)_\d+", base) is not None
    return base in ("archive_format", "archive_version", "byteorder", "version") or (
        base.startswith("serialization_id") or base.startswith(".")
    )


def _check_pickle(path: Path, name: str, content: bytes) -> None:
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(path, f"more than numbers in {name}") from error


def _check_json(path: Path, name: str, value) -> None:
    if isinstance(value, list):
        for item in value:
            _check_json(path, name, item)
    if not isinstance(value, dict):
        return
    if value.get("use_pickle"):
        raise _refused(path, f"pickled objects named in {name}")
    expression = value.get("expr_str", "")
    if not (isinstance(expression, str) and _EXPRESSION.fullmatch(expression)):
        raise _refused(path, f"the expression {expression!r} in {name}")
    target = value.get("target")
    if isinstance(target, str) and "inputs" in value and not _OPERATOR.fullmatch(target):
        raise _refused(path, f"the operator {target!r} in {name}")
    for item in value.values():
        _check_json(path, name, item)


def _refused(path: Path, what: str) -> InputError:
    return InputError(f"{path} is refused: it contains {what}, and reading that could run any code")
