"""Any file of a model, as a classifier: the one place that knows all kinds of them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from moth_jax.errors import InputError, require_choice
from moth_jax.models import MODELS, build, checkpoint, from_torch, outline
from moth_jax.models.classifier import (
    Classifier,
    Reading,
    check_class_names,
    check_image_shape,
    check_normalisation,
    check_num_classes,
    flat,
)
from moth_jax.models.weights.files import READERS, check_content, read_file
from moth_jax.models.weights.fitting import Weights, fit, named
from moth_jax.models.weights.importing import load
from moth_jax.storage.folders import current_folder
from moth_jax.types import Variables

AUTO = "auto"
TRUST = ("nothing", "torchvision")
_NOT_GIVEN = (None, (), "", AUTO, TRUST[0])  # values of options
_PROGRAM = ".pt2"
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_IMAGENET_ASSUMED = (
    "assumed, because weights do not show it: images normalised with mean (0.485, 0.456, 0.406) "
    "and std (0.229, 0.224, 0.225)"
)
_SHAPE = (224, 224, 3)
_TORCHVISION = "torchvision:"


def load_source(
    path: str | Path,
    *,
    arch: str = AUTO,
    builder: str = "",
    trust: str = "nothing",
    num_classes: int | None = None,
    class_names: tuple[str, ...] = (),
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    image_shape: tuple[int, int, int] | None = None,
    weights: str = "",
) -> tuple[Classifier, Variables]:
    """The classifier in a file, or in a checkpoint folder of this package.

    Its `reading` says what was assumed of it, and the accuracy that the file says it has.

    Args:
      path: weights (PyTorch, safetensors or Keras 2), a program of `torch.export` (.pt2), a whole
        PyTorch module, or a checkpoint folder, which takes no other option than `num_classes`.
      arch: the architecture of the weights. "auto" recognises the layouts of `importing.LAYOUTS`;
        else a name of `models.MODELS`, or of any other classifier of torchvision
        ("torchvision:vgg19" where both have the name).
      builder: instead of `arch`, "FILE.py:FUNCTION" or "PACKAGE.MODULE:FUNCTION", which returns the
        PyTorch module whose weights these are.
      trust: "torchvision" also reads files of whole modules, of classes of torchvision alone.
      num_classes: the number of classes that the head is to have. Weights of another number, or
        without a head, get a new one with a warning: the architecture initialises it, or it is that
        of the module of `builder`, which must have this number of classes. The head of a program
        or a whole module cannot be exchanged.
      class_names: one for each output of the model.
      mean, std: what the model normalises pixels in [0, 1] with. A known layout or a classifier of
        torchvision has its own; they must be given for all others.
      image_shape: (h, w, c); that of the layout, or (224, 224, 3), if not given.
      weights: which of several sets of weights in the file, such as "state_dict_ema". If it is not
        given, one is taken, with a warning that names the others.

    Raises:
      InputError: what is wrong with the file, or does not fit together.
    """
    path = current_folder(Path(path).expanduser())
    if not path.exists() and path.suffix.lower() not in READERS:
        raise InputError(f"there is no {path}")
    require_choice("trust", trust, TRUST)
    _check_options(num_classes, class_names, mean, std, image_shape)
    if path.is_dir():
        options = dict(
            arch=arch,
            builder=builder,
            trust=trust,
            class_names=class_names,
            mean=mean,
            std=std,
            image_shape=image_shape,
            weights=weights,
        )
        return _of_checkpoint(path, num_classes, options)
    is_fixed = head_is_fixed(path, trust)
    surplus = [name for name, value in (("builder", builder), ("weights", weights)) if value]
    if is_fixed and surplus:
        raise InputError(
            f"{path} is read as a whole model; leave out {', '.join(surplus)}, or give its "
            "state_dict"
        )
    if not is_fixed and path.suffix.lower() not in READERS:
        raise InputError(
            f"cannot read a model from {path.name!r}: the extension must be one of "
            f"{', '.join(sorted([*READERS, _PROGRAM]))}, or it is a checkpoint folder"
        )
    if arch in (AUTO, *MODELS) and not (is_fixed or builder):
        return load(
            path,
            arch=arch,
            num_classes=num_classes,
            class_names=class_names,
            mean=mean,
            std=std,
            image_shape=image_shape,
            chosen=weights,
        )
    _check_torch(path.name)
    default = None if is_fixed or builder else _IMAGENET
    if default is not None:
        check_architecture(arch)
    assumed = _IMAGENET_ASSUMED if default and mean is None else ""
    mean, std = _normalisation(path, mean, std, default)
    if is_fixed:
        model, claim = _whole(path), None
    else:
        found, claim = read_file(path, chosen=weights)
        how = dict(num_classes=num_classes, normalisation=None if assumed else (mean, std))
        model = _module(found, arch=arch, builder=builder, **how)
    classifier, variables = from_torch(
        model,
        image_shape=image_shape or _SHAPE,
        mean=mean,
        std=std,
        name=arch if arch != AUTO else "",
    )
    spec = classifier.spec
    if num_classes not in (None, spec.num_classes):
        raise InputError(
            f"{path} has a head of {spec.num_classes} classes that is part of a whole model, so it "
            f"cannot get one of {num_classes}; give its state_dict, with an architecture or a "
            "builder"
            if is_fixed
            else f"{builder} builds a model of {spec.num_classes} classes, not {num_classes}; "
            "change what it builds"
        )
    spec = named(spec, class_names, head_is_fixed=is_fixed or bool(builder))
    classifier = dataclasses.replace(outline(spec)[0], reading=Reading(assumed, claim))
    return classifier, variables


def _check_options(num_classes, class_names, mean, std, image_shape) -> None:
    """Raise `InputError` for options that no model can have, before anything is read."""
    if num_classes is not None:
        if num_classes < 2:
            raise InputError(f"num_classes must be at least 2, got {num_classes}")
        check_num_classes(num_classes)
    check_class_names(tuple(class_names), len(class_names))
    if image_shape is not None:
        check_image_shape(image_shape)
    check_normalisation(mean, std, image_shape and image_shape[-1])


def check_architecture(name: str) -> None:
    """Raise `InputError` unless `load_source` knows an architecture; imports torch if it must.

    A name of torchvision is known if its classifier can be converted.
    """
    if name in (AUTO, *MODELS):
        return
    _check_torch(name)
    from moth_jax.models.weights import torch_builders

    torch_builders.check_torchvision(name.removeprefix(_TORCHVISION))


def _of_checkpoint(
    path: Path, num_classes: int | None, options: dict
) -> tuple[Classifier, Variables]:
    """The classifier in a checkpoint folder, which takes none of `options`."""
    check_alone(path, options)
    classifier, variables = checkpoint.load_model(path)
    if num_classes is None:
        return classifier, variables
    return with_classes(classifier, variables, num_classes, path)


def check_alone(path: Path, options: Mapping, prefix: str = "") -> None:
    """Raise `InputError` if a checkpoint was given options, other than `num_classes`, to read it.

    `prefix` is what the user writes before a name, such as "--".
    """
    surplus = [
        f"{prefix}{name}"
        for name, value in options.items()
        if name != "num_classes" and value not in _NOT_GIVEN
    ]
    if surplus:
        raise InputError(
            f"{path} is a checkpoint, which says by itself what it is; leave out "
            f"{', '.join(surplus)}"
        )


def head_is_fixed(path: str | Path, trust: str) -> bool:
    """Whether a file holds a whole model, whose head cannot be exchanged, instead of weights."""
    return Path(path).suffix.lower() == _PROGRAM or trust == "torchvision"


def with_classes(
    classifier: Classifier, variables: Variables, num_classes: int, source: Path
) -> tuple[Classifier, Variables]:
    """A model of a checkpoint with a new head, and a warning, if it has another number of classes.

    Raises:
      InputError: a converted model, whose program does not say how it is initialised.
    """
    spec = classifier.spec
    if num_classes == spec.num_classes:
        return classifier, variables
    if spec.graph is not None:
        raise InputError(
            f"{source} is a converted {spec.arch} of {spec.num_classes} classes, which cannot get "
            f"a head of {num_classes}; convert its state_dict anew with "
            f"--num-classes={num_classes}, or give that to a run with model.fine_tune"
        )
    spec = dataclasses.replace(spec, num_classes=num_classes, class_names=())
    classifier, shapes = outline(spec)
    leaves = flat(shapes)
    weights = fit(
        flat(variables),
        {name: leaf.shape for name, leaf in leaves.items()},
        what=spec.arch,
        head={n: leaf.ndim - 1 for n, leaf in leaves.items() if n.startswith("params.head.")},
        fresh=lambda: flat(build(spec)[1]),
    )
    return classifier, {
        kind: {name: weights[f"{kind}.{name}"] for name in leaves}
        for kind, leaves in shapes.items()
    }


def _check_torch(what: str) -> None:
    try:
        import torch  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(f"{what} needs PyTorch: pip install 'moth-jax[torch]'") from None


def _whole(path: Path):
    """The program, or the whole PyTorch module, in a file."""
    check_content(path)
    from moth_jax.models.pytorch import files

    is_program = path.suffix.lower() == _PROGRAM
    return files.read_program(path) if is_program else files.read_module(path)


def _module(weights: Weights, *, arch: str, builder: str, **options):
    """The PyTorch module with these weights."""
    from moth_jax.models.weights import torch_builders

    if builder:
        return torch_builders.built_with_weights(builder, weights, **options)
    return torch_builders.torchvision_module(arch.removeprefix(_TORCHVISION), weights, **options)


def _normalisation(path, mean, std, default) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if mean is not None and std is not None:
        return mean, std
    if default is None or (mean, std) != (None, None):
        raise InputError(
            f"say how the model of {path} normalises images: mean and std, one number per channel, "
            "for pixels in [0, 1]; 0 and 1 if it takes such pixels as they are"
        )
    return default
