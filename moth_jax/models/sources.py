"""Whatever a user has, as a classifier: the one place that knows all kinds of sources."""

from pathlib import Path

from moth_jax.errors import InputError, require_choice
from moth_jax.models import MODELS
from moth_jax.models.functional import Classifier, Variables
from moth_jax.models.importing import load
from moth_jax.models.weight_files import read_weights

AUTO = "auto"
TRUST = ("nothing", "torchvision")
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SHAPE = (224, 224, 3)
_TORCHVISION = "torchvision:"


def load_source(
    path: str | Path,
    *,
    arch: str = AUTO,
    builder: str = "",
    trust: str = "nothing",
    class_names: tuple[str, ...] = (),
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    image_shape: tuple[int, int, int] | None = None,
) -> tuple[Classifier, Variables]:
    """The classifier in a file.

    Args:
      path: weights (PyTorch, safetensors or Keras 2), a program of `torch.export` (.pt2), or a
        whole PyTorch module.
      arch: whose weights these are: "auto" recognises the layouts of `importing.LAYOUTS`; a name of
        `models.MODELS`, or of any other classifier of torchvision ("torchvision:vgg19" where both
        have the name).
      builder: instead of `arch`, "FILE.py:FUNCTION" or "PACKAGE.MODULE:FUNCTION", which returns the
        PyTorch module whose weights these are.
      trust: "torchvision" also reads files of whole modules, of classes of torchvision alone.
      class_names: one for each output of the model.
      mean, std: what the model normalises pixels in [0, 1] with. A known layout or a classifier of
        torchvision has its own; they must be given for all others.
      image_shape: (h, w, c); that of the layout, or (224, 224, 3), if not given.

    Raises:
      InputError: what is wrong with the file, or does not fit together.
    """
    path = Path(path).expanduser()
    require_choice("trust", trust, TRUST)
    if path.suffix.lower() == ".pt2":
        from moth_jax.models.torch_files import read_program

        what, default = read_program(path), None
    elif trust == "torchvision":
        from moth_jax.models.torch_files import read_module

        what, default = read_module(path), None
    elif builder:
        from moth_jax.models.torch_builders import built_module, with_weights

        what, default = with_weights(built_module(builder), read_weights(path), builder), None
    elif arch in (AUTO, *MODELS):
        return load(
            path,
            arch=arch,
            num_classes=len(class_names) or None,
            class_names=class_names,
            mean=mean,
            std=std,
            image_shape=image_shape,
        )
    else:
        from moth_jax.models.torch_builders import torchvision_module

        name = arch.removeprefix(_TORCHVISION)
        what, default = torchvision_module(name, read_weights(path)), _IMAGENET
    from moth_jax.models.torch_export import from_torch

    mean, std = _normalisation(path, mean, std, default)
    return from_torch(
        what,
        image_shape=image_shape or _SHAPE,
        mean=mean,
        std=std,
        class_names=class_names,
        name=arch if arch != AUTO else "",
    )


def _normalisation(path, mean, std, default):
    given = (mean, std)
    if None not in given:
        return given
    if default is None or given != (None, None):
        raise InputError(
            f"say how the model of {path} normalises images: mean and std, one number per channel, "
            "for pixels in [0, 1]; 0 and 1 if it takes such pixels as they are"
        )
    return default
