"""Tensors of PyTorch as NumPy arrays. Needs torch."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from moth_jax.errors import InputError, listed
from moth_jax.storage.limits import check_expansion


def as_arrays(tensors: Mapping[str, torch.Tensor], path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file, floating ones in float32.

    Raises:
      InputError: naming tensors that are no plain arrays of real numbers, or that say they are
        larger than the file can hold.
    """
    odd = [f"{name} ({what})" for name, tensor in tensors.items() if (what := _oddity(tensor))]
    if odd:
        raise InputError(
            f"{path} has weights that are no plain arrays of real numbers: {listed(odd, str)}; "
            "save the state_dict of the original module in float32"
        )
    check_expansion(path, (t.numel() * t.element_size() for t in tensors.values()), "tensors")
    return {name: _array(tensor) for name, tensor in tensors.items()}


def _oddity(tensor: torch.Tensor) -> str:
    """Return what a tensor is where it is no array of real numbers; "" where it is one."""
    kinds = {
        "nested": tensor.is_nested,
        "quantised": tensor.is_quantized,
        "without numbers, on the meta device": tensor.is_meta,
        "complex": tensor.is_complex(),
    }
    layout = "" if tensor.layout == torch.strided else f"sparse, {tensor.layout}"
    return next((what for what, is_so in kinds.items() if is_so), layout)


def _array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().resolve_neg()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
