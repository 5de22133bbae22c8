"""Data sets: `DATASETS` holds a loader for each; `data.sources` says what a loader is."""

import inspect
import os
import typing
from collections.abc import Iterable

from moth_jax.data.dataset import ImageDataset, ImageSplit
from moth_jax.data.sources.digits import load_digits
from moth_jax.data.sources.folder import load_folder
from moth_jax.data.sources.gtsrb import load_gtsrb
from moth_jax.data.sources.imagenet import load_imagenet2012, load_imagenette
from moth_jax.data.sources.lisa import load_lisa
from moth_jax.data.sources.npz import load_npz
from moth_jax.data.sources.tfds import load_cifar10, load_svhn
from moth_jax.errors import InputError, require_choice
from moth_jax.typed import is_of, name_of, shown

__all__ = ["DATASETS", "ImageDataset", "ImageSplit", "check_known", "load"]

DATASETS = {
    "cifar10": load_cifar10,
    "digits": load_digits,
    "folder": load_folder,
    "gtsrb": load_gtsrb,
    "imagenet2012": load_imagenet2012,
    "imagenette": load_imagenette,
    "lisa": load_lisa,
    "npz": load_npz,
    "svhn": load_svhn,
}


def load(name: str, **options) -> ImageDataset:
    """Load the data set `name` of `DATASETS` with the options of its loader.

    Raises:
      InputError: for an unknown name or option, and for whatever the loader finds.

    Example:
      >>> load("digits", seed=1).num_classes
      10
      >>> load("digits", size=32)
      Traceback (most recent call last):
      ...
      moth_jax.errors.InputError: data set 'digits' has no option size; its options are: \
seed, validation_fraction
    """
    check_known(name, options)
    hints = typing.get_type_hints(DATASETS[name])
    for option, value in options.items():
        plain = os.fspath(value) if isinstance(value, os.PathLike) else value
        if value is not None and option in hints and not is_of(plain, hints[option]):
            raise InputError(f"{option} must be {name_of(hints[option])}, got {shown(value)}")
    return DATASETS[name](**options)


def check_known(name: str, options: Iterable[str]) -> None:
    """Raise `InputError` for an unknown data set, or options that its loader does not have."""
    require_choice("data set", name, DATASETS)
    allowed = inspect.signature(DATASETS[name]).parameters
    unknown = [option for option in options if option not in allowed]
    if unknown:
        raise InputError(
            f"data set {name!r} has no option {', '.join(unknown)}; its options are: "
            f"{', '.join(sorted(allowed))}"
        )
