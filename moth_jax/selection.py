"""Which classes and directions a run measures and hardens, as labels instead of names."""

import ml_collections
import numpy as np

from moth_jax import configuration
from moth_jax.data import ImageDataset
from moth_jax.errors import InputError

_MAX_NAMES = 50


def chosen_classes(config: ml_collections.ConfigDict, dataset: ImageDataset) -> tuple[int, ...]:
    """Return the labels of the classes that are measured and hardened among each other.

    They are `config.classes`, in that order, or all that there are images of.

    Raises:
      InputError: there is no class of such a name, or fewer than two, or none of its images.
    """
    numbers = _numbers("classes", config.classes, dataset)
    if config.classes and (len(numbers) < 2 or len(set(numbers)) < len(numbers)):
        raise InputError(
            "classes must name at least 2 different classes, got "
            f"{', '.join(map(str, config.classes))}"
        )
    return configuration.moth_config(config, classes=numbers).chosen(dataset)


def is_subset(classes: tuple[int, ...], dataset: ImageDataset) -> bool:
    """Whether there are images of classes besides `classes`."""
    return not set(dataset.present) <= set(classes)


def directions(config: ml_collections.ConfigDict, dataset: ImageDataset) -> list[tuple[int, int]]:
    """Return the directions to measure, pairs of labels: the same before and after."""
    classes = chosen_classes(config, dataset)
    victims = _numbers("distance.victims", config.distance.victims, dataset) or classes
    outside = [dataset.class_names[k] for k in victims if k not in classes]
    if outside:
        raise InputError(
            f"distance.victims must be among the chosen classes, got {', '.join(outside)}; add "
            "them to classes"
        )
    pairs = [(a, b) for a in classes if a in victims for b in classes if a != b]
    count = config.distance.num_directions
    if not 0 <= count <= len(pairs):
        raise InputError(f"distance.num_directions must be in 0..{len(pairs)}, got {count}")
    if count == 0:
        return pairs
    chosen = np.random.default_rng(config.seed).choice(len(pairs), count, replace=False)
    return [pairs[i] for i in sorted(chosen)]


def _numbers(field: str, names, dataset: ImageDataset) -> tuple[int, ...]:
    """Return the labels of `names`, the value of a field, in the order given."""
    labels = {name: k for k, name in enumerate(dataset.class_names)}
    names = [str(name) for name in names]
    unknown = sorted(set(names) - labels.keys())
    if unknown:
        more = len(labels) - _MAX_NAMES
        raise InputError(
            f"unknown classes in {field}: {', '.join(unknown)}; the classes are: "
            f"{', '.join(dataset.class_names[:_MAX_NAMES])}"
            + (f" and {more} more" if more > 0 else "")
        )
    return tuple(labels[name] for name in names)
