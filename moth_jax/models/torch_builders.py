"""PyTorch modules by name, from torchvision or a user's own Python, and their weights. Needs torch.

The weights are checked against the module before they go in, all faults in one message.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from moth_jax.errors import InputError
from moth_jax.models.functional import describe_mismatch

Weights = dict[str, np.ndarray]
# Prefixes of the parts of GoogLeNet and Inception v3 that only their own training uses.
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
_IMAGENET_CLASSES = 1000


def torchvision_module(name: str, weights: Weights) -> torch.nn.Module:
    """torchvision's classifier `name` with as many classes as `weights` have, and these weights.

    Raises:
      InputError: torchvision is missing or has no such classifier, or the weights are of another.

    Note: torchvision's GoogLeNet and Inception v3 with 1,000 classes were trained with
    `transform_input`, a normalisation of their own, and that is put in; others are taken to have
    been trained without. Where this is wrong, give a builder.
    """
    models = _torchvision()
    names = models.list_models(module=models)
    if name not in names:
        raise InputError(f"torchvision has no classifier {name!r}; it has {', '.join(names)}")
    builder = models.get_model_builder(name)
    options = {}
    if "aux_logits" in inspect.signature(_builder_class(models, builder)).parameters:
        options["aux_logits"] = any(key.startswith(_AUXILIARY) for key in weights)
        options["init_weights"] = False
    with torch.device("meta"):
        widest = builder(num_classes=_IMAGENET_CLASSES, **options).state_dict()
    count = _head_size(widest, weights)
    if options:
        options["transform_input"] = count == _IMAGENET_CLASSES
    return with_weights(builder(num_classes=count, **options), weights, name)


def _builder_class(models, builder: Callable) -> type:
    """The class whose options a builder passes on."""
    classes = {"googlenet": "GoogLeNet", "inception_v3": "Inception3"}
    return getattr(models, classes.get(builder.__name__, ""), builder)


def _torchvision():
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:  # the second where it was built for another torch
        raise InputError(
            f"torchvision cannot be imported ({error}); pip install 'moth-jax[torch]', or give a "
            "builder of your own"
        ) from error
    return models


def _head_size(widest: dict, weights: Weights) -> int:
    """The number of classes, read off an array that has as many rows as there are classes."""
    for name, tensor in widest.items():
        if tensor.ndim and tensor.shape[0] == _IMAGENET_CLASSES and name in weights:
            return weights[name].shape[0]
    return _IMAGENET_CLASSES


def built_module(builder: str) -> torch.nn.Module:
    """What a function of a user's own returns.

    Args:
      builder: "package.module:function" or "path/to/file.py:function"; called without arguments.

    Raises:
      InputError: there is no such function, or it returns no module.
    """
    source, _, name = builder.rpartition(":")
    if not source or not name.isidentifier():
        raise InputError(
            f"a builder is given as FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION, got {builder!r}"
        )
    function = getattr(_imported(source), name, None)
    if not callable(function):
        raise InputError(f"{source} has no function {name!r}")
    module = function()
    if not isinstance(module, torch.nn.Module):
        raise InputError(
            f"{builder} must return a torch.nn.Module, but returns a {type(module).__name__}"
        )
    return module


def _imported(source: str):
    if not source.endswith(".py"):
        try:
            return importlib.import_module(source)
        except ImportError as error:
            raise InputError(f"cannot import {source}: {error}") from error
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(f"there is no Python file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise InputError(f"cannot import {path}: {error}") from error
    return module


def with_weights(module: torch.nn.Module, weights: Weights, name: str) -> torch.nn.Module:
    """`module` with `weights`, which must be all of its state_dict.

    Counters of batches, which nothing computes with and old files lack, may be missing.

    Raises:
      InputError: naming every array that is missing, unused or of another shape.
    """
    own = module.state_dict()
    optional = {key for key in own if key.endswith("num_batches_tracked")} - weights.keys()
    expected = {key: tuple(value.shape) for key, value in own.items() if key not in optional}
    given = {key: tuple(value.shape) for key, value in weights.items()}
    mismatch = describe_mismatch(expected, given)
    if mismatch:
        raise InputError(f"the weights do not fit {name}: {mismatch}")
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in weights.items()}
    module.load_state_dict({**own, **tensors})
    return module
