"""PyTorch modules and programs in memory as classifiers. Needs torch, and only to convert."""

import copy
import dataclasses
import io
import warnings
from collections.abc import Sequence

import torch  # pyright: ignore[reportMissingImports]

from moth_jax.errors import InputError, first_line
from moth_jax.models.classifier import Classifier
from moth_jax.models.pytorch.programs import Program, from_program, read
from moth_jax.types import Variables

# What torch.export raises, and what a module's own code may: its own kinds derive from these.
_EXPORT_FAULTS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    LookupError,
    ArithmeticError,
)


def from_torch(
    model: "torch.nn.Module | torch.export.ExportedProgram",
    *,
    image_shape: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    class_names: Sequence[str] = (),
    name: str = "",
) -> tuple[Classifier, Variables]:
    """Turn a PyTorch classifier into a pure JAX function and its parameters.

    Args:
      model: a module from images [n c h w] to logits [n K], which stays as it is, or a program
        that `torch.export` made of one with a free batch size.
      image_shape: (h, w, c) of the images.
      mean, std: one per channel, of pixels in [0, 1]: what images are normalised with before they
        reach the module. (0, 0, 0) and (1, 1, 1) if it normalises itself.
      class_names: K names, if known.
      name: of the architecture; the module's class if not given.

    Returns:
      The classifier, and its variables under the module's own names. `forward_train` updates batch
      normalisation; everything else, dropout included, is as in evaluation mode.

    Raises:
      InputError: an operator has no rule (with the layer it is in), the batch size is fixed, or the
        result is not one array of logits.

    Note: Dropout is left out in training. The published hardening leaves it out as well, since its
    model stays in evaluation mode, and a trigger's stamp is to be unlearned by the whole network.
    """
    if isinstance(model, torch.nn.Module):
        name = name or type(model).__name__
    return from_program(
        _program(model, image_shape),
        image_shape=image_shape,
        mean=mean,
        std=std,
        class_names=class_names,
        name=name,
    )


def _program(model, image_shape) -> Program:
    """The program as a file of torch.export holds it, without operators that change arguments."""
    height, width, channels = image_shape
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, of its own deprecations
        exported = model
        if isinstance(model, torch.nn.Module):
            exported = _exported(model, torch.zeros(2, channels, height, width))
        try:
            exported = exported.run_decompositions({})
            torch.export.save(exported, file)
        except _EXPORT_FAULTS as error:
            raise InputError(
                f"torch.export cannot simplify the program: {first_line(error)}"
            ) from error
    program = read(file, "the program", file.getbuffer().nbytes)
    is_module = isinstance(model, torch.nn.Module)
    names = tuple(model.state_dict() if is_module else exported.state_dict)
    return program._replace(graph=dataclasses.replace(program.graph, persistent=names))


def _exported(module, images):
    free_batch = ({0: torch.export.Dim.DYNAMIC},)
    try:
        own = copy.deepcopy(module).cpu().float().eval()
        with torch.no_grad():
            return torch.export.export(own, (images,), dynamic_shapes=free_batch)
    except _EXPORT_FAULTS as error:
        raise InputError(
            f"torch.export cannot turn {type(module).__name__} into a program for images "
            f"{tuple(images.shape[1:])} with a free batch size: {first_line(error)}"
        ) from error
