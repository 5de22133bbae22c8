"""Which classes, directions and backdoor a run is about, as labels instead of names."""

import ml_collections

from moth_jax import backdoors
from moth_jax.data import ImageDataset
from moth_jax.distance.directions import DirectionChoice, choose_directions
from moth_jax.errors import InputError
from moth_jax.run import configuration

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


def directions(config: ml_collections.ConfigDict, dataset: ImageDataset) -> DirectionChoice:
    """Return the directions to measure, the same before and after.

    With `distance.nearest` they are those among which the nearest are to be found.

    Raises:
      InputError: there are no such classes or not so many directions, or two ways to choose them.
    """
    classes, options = chosen_classes(config, dataset), config.distance
    ends = {}
    for name in ("victims", "targets"):
        ends[name] = _numbers(f"distance.{name}", options[name], dataset)
        outside = [dataset.class_names[k] for k in ends[name] if k not in classes]
        if outside:
            raise InputError(
                f"distance.{name} must be among the chosen classes, got {', '.join(outside)}; add "
                "them to classes"
            )
    if options.nearest and options.num_directions:
        raise InputError(
            "distance.nearest and distance.num_directions are two ways to choose directions: "
            f"leave one of them at 0, got {options.nearest} and {options.num_directions}"
        )
    every = choose_directions(classes, **ends)
    most = every.details["of"]
    for name in ("num_directions", "nearest"):
        if not 0 <= options[name] <= most:
            raise InputError(f"distance.{name} must be in 0..{most}, got {options[name]}")
    if not options.num_directions:
        return every
    return choose_directions(
        classes, **ends, num_directions=options.num_directions, seed=config.seed
    )


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
