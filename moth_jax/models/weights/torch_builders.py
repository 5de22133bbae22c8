"""PyTorch modules by name, from torchvision or a user's own Python, and their weights. Needs torch.

The weights are checked against the module before they go in, all faults in one message.
"""

import importlib
import importlib.util
import inspect
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from moth_jax.errors import InputError
from moth_jax.models.weights.fitting import (
    Normalisation,
    Weights,
    check_floats,
    fit,
    head_size,
    without_prefix,
)

# Prefixes of the parts of GoogLeNet and Inception v3 that only their own training uses.
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
_IMAGENET_CLASSES = 1000
_NOT_CONVERTED = ("swin_", "maxvit_")  # their operators have no rules in `pytorch.rules`
_FAULTS = (Exception, SystemExit)  # a user's file may do anything when it is run
Built = TypeVar("Built")
_NO_WIDTH = 997  # a number of classes that no other layer has as its width


def check_torchvision(name: str) -> None:
    """Raise `InputError` unless torchvision has a classifier `name` that can be converted."""
    names = (models := _torchvision()).list_models(module=models)
    if name not in names:
        raise InputError(f"torchvision has no classifier {name!r}; it has {', '.join(names)}")
    if name.startswith(_NOT_CONVERTED):
        raise InputError(
            f"torchvision's {name} cannot be converted: it has operators without a rule in JAX, "
            f"like all whose names begin with {' or '.join(_NOT_CONVERTED)}; choose another one"
        )


def torchvision_module(
    name: str,
    weights: Weights,
    *,
    num_classes: int | None = None,
    normalisation: Normalisation = None,
) -> torch.nn.Module:
    """torchvision's classifier `name` with these weights, and as many classes as they have.

    `num_classes` asks for another number. Where the weights have no head of that number, the
    module's own stays, with a warning. `normalisation` is as in `fit`.

    Raises:
      InputError: torchvision is missing or has no such classifier, or the weights are of another.

    Note: torchvision's GoogLeNet and Inception v3 with 1,000 classes were trained with
    `transform_input`, a normalisation of their own, and that is put in; others are taken to have
    been trained without. Where this is wrong, give a builder.
    """
    check_torchvision(name)
    models = _torchvision()
    builder = models.get_model_builder(name)
    options = {}
    if "aux_logits" in inspect.signature(_builder_class(models, builder)).parameters:
        options = {"aux_logits": True, "init_weights": False}
    with torch.device("meta"):
        outline = builder(num_classes=_NO_WIDTH, **options).state_dict()
    weights = without_prefix(weights, outline)
    head = {key: 0 for key, array in outline.items() if array.shape[:1] == (_NO_WIDTH,)}
    found = head_size(weights, head)
    if options:
        options["aux_logits"] = any(key.startswith(_AUXILIARY) for key in weights)
        options["transform_input"] = found == _IMAGENET_CLASSES
    count = num_classes or found or _IMAGENET_CLASSES
    module = seeded(lambda: builder(num_classes=count, **options))
    return with_weights(
        module,
        weights,
        name,
        head=head,
        new_head=num_classes is not None,
        normalisation=normalisation,
    )


def _builder_class(models, builder: Callable) -> Callable:
    """The class whose options a builder passes on."""
    classes = {"googlenet": "GoogLeNet", "inception_v3": "Inception3"}
    return getattr(models, classes.get(builder.__name__, ""), builder)


def _torchvision():
    try:
        from torchvision import models  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:  # the second where it was built for another torch
        raise InputError(
            f"torchvision cannot be imported ({error}); pip install 'moth-jax[torch]', or give a "
            "builder of your own"
        ) from error
    return models


def seeded(build: Callable[[], Built]) -> Built:
    """What `build` returns, the same random weights each time; torch's own state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def built_module(builder: str) -> torch.nn.Module:
    """The module that a user's function returns.

    Args:
      builder: "package.module:function" or "path/to/file.py:function"; called without arguments.

    Raises:
      InputError: there is no such function, it fails, or it returns no module.
    """
    source, _, name = builder.rpartition(":")
    if not source or not name.isidentifier():
        raise InputError(
            f"a builder is given as FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION, got {builder!r}"
        )
    function = getattr(_imported(source), name, None)
    if not callable(function):
        raise InputError(f"{source} has no function {name!r}")
    try:
        module = seeded(function)
    except _FAULTS as error:
        raise InputError(f"builder {builder} failed: {_in_words(error)}") from error
    if not isinstance(module, torch.nn.Module):
        raise InputError(
            f"{builder} must return a torch.nn.Module, but returns a {type(module).__name__}"
        )
    return module


def _imported(source: str):
    if not source.endswith(".py"):
        try:
            return importlib.import_module(source)
        except _FAULTS as error:
            raise InputError(f"cannot import {source}: {_in_words(error)}") from error
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(f"there is no Python file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except _FAULTS as error:
        raise InputError(f"cannot import {path}: {_in_words(error)}") from error
    return module


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 300)}"


def with_weights(
    module: torch.nn.Module,
    weights: Weights,
    name: str,
    *,
    head: Mapping[str, int] | None = None,
    new_head: bool = False,
    normalisation: Normalisation = None,
) -> torch.nn.Module:
    """`module` with `weights`, which must be all of its state_dict.

    Args:
      module: what gets the weights, and keeps its own for a new head.
      weights: a prefix of all names is removed (`fitting.foreign_prefix`), and counters of batches
        may be missing.
      name: of the module, for messages.
      head: its arrays with an axis of classes, if that is known.
      new_head: the module's own arrays stay, with a warning, where those of `head` are missing or
        of another number of classes.
      normalisation: as in `fit`.

    Raises:
      InputError: naming every array that is missing, unused, of another shape, or of integers where
        the module has floats.
    """
    own = module.state_dict()
    shapes = {key: tuple(value.shape) for key, value in own.items()}
    head = {key: axis for key, axis in (head or {}).items() if key in own}
    fresh = (lambda: {key: own[key].numpy() for key in head}) if new_head else None
    weights = fit(weights, shapes, what=name, head=head, fresh=fresh, normalisation=normalisation)
    floats = [key for key in own if key in weights and own[key].is_floating_point()]
    check_floats(weights, floats, name)
    tensors = {key: torch.from_numpy(np.array(weights[key])) for key in own if key in weights}
    module.load_state_dict({**own, **tensors})
    return module


def built_with_weights(
    builder: str,
    weights: Weights,
    *,
    num_classes: int | None = None,
    normalisation: Normalisation = None,
) -> torch.nn.Module:
    """The module that `built_module` gives, with these weights.

    `num_classes` says that the module has this number of classes. Its arrays with that number of
    rows stay, with a warning, where the weights lack them or differ in the number of rows alone.
    """
    module = built_module(builder)
    rows = {key: 0 for key, v in module.state_dict().items() if v.shape[:1] == (num_classes,)}
    return with_weights(
        module,
        weights,
        builder,
        head=rows,
        new_head=num_classes is not None,
        normalisation=normalisation,
    )
