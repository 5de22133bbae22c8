"""Which classes, directions and backdoor a run is about, as labels instead of names."""

import ml_collections
import numpy as np

from moth_jax import backdoors, configuration
from moth_jax.data import ImageDataset
from moth_jax.errors import InputError

_MAX_NAMES = 50
_NO_OPTIONS = {"kind", "target", "victims", "rate", "cover_rate", "seed"}


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
    return configuration.method_config(config, classes=numbers).chosen(dataset)


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


def chosen_backdoor(
    config: ml_collections.ConfigDict, dataset: ImageDataset
) -> backdoors.Backdoor | None:
    """Return the backdoor of `config.backdoor`, None if it is of no kind.

    Raises:
      InputError: an unknown class or option, or a trigger that does not fit into the images.
    """
    fields = config.backdoor.to_dict()
    kind, target = fields["kind"], fields["target"]
    if not kind:
        return None
    if not target:
        raise InputError("backdoor.target must name a class, got ''")
    (target,) = _numbers("backdoor.target", [_name(target, dataset)], dataset)
    victims = [_name(victim, dataset) for victim in fields["victims"]]
    options = {
        name: value
        for name, value in fields.items()
        if name not in _NO_OPTIONS and value is not None
    }
    if "seed" in backdoors.options(kind):
        options["seed"] = fields["seed"]
    return backdoors.Backdoor(
        backdoors.create(kind, dataset.image_shape, **options),
        target,
        _numbers("backdoor.victims", victims, dataset),
        kind,
    )


def _name(given, dataset: ImageDataset) -> str:
    """Return the name of a class that is given by name or, if there is none such, by number."""
    given, names = str(given), dataset.class_names
    is_number = given not in names and given.isdecimal() and int(given) < len(names)
    return names[int(given)] if is_number else given


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
