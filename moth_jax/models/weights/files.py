"""Files of weights to named NumPy arrays. Nothing is ever unpickled freely."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moth_jax.errors import InputError, first_line
from moth_jax.models.classifier import Claim
from moth_jax.models.pytorch.saved import as_arrays, damaged, read_content
from moth_jax.models.values import check_values
from moth_jax.models.weights import sets

# What a failed download often leaves, by its first bytes. A length in front of a header, which
# safetensors begin with, may have the same first bytes, but has zeros too.
_NOT_WEIGHTS = {
    rb"<[!?/a-zA-Z]": "an HTML or XML page, not weights; download the file itself",
    rb"version https://git-lfs": "a Git LFS pointer, not weights; run `git lfs pull`",
}


class WeightsFile(NamedTuple):
    """The weights in a file by name, and the accuracy that the file says they have, if it does."""

    arrays: dict[str, np.ndarray]
    claim: Claim | None


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of `read_file`."""
    return read_file(path).arrays


def read_file(path: str | Path, *, chosen: str = "") -> WeightsFile:
    """All arrays of a file by name, floating ones as float32, and what it says beside them.

    PyTorch (.th, .pt, .pth, .tar; needs torch), safetensors, or Keras 2 HDF5 (.h5, .hdf5). A nested
    `state_dict` is unwrapped. Keras layers are numbered anew from 1 (`conv2d_1/kernel`), because
    Keras counts on over all models of a process. Where there are several sets of weights, `chosen`
    names one, such as "state_dict_ema"; else one is taken, with a warning if the others differ.

    Raises `InputError` for a file that is missing, damaged, of an unknown kind, would run code when
    read, or has numbers that no trained model has (`values.check_values`).
    """
    path = Path(path).expanduser()
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(
            f"cannot read weights from {path.name!r}: the extension must be one of "
            f"{', '.join(sorted(READERS))}"
        )
    check_content(path)
    content, facts = reader(path)
    found = sets.choose(content, chosen, path)
    arrays = _arrays(found.arrays, path)
    check_values(arrays, path)
    others = {name: other for name, other in found.others.items() if _differs(other, arrays, path)}
    if others:
        warnings.warn(sets.describe_choice(path, found._replace(others=others)), stacklevel=2)
    return WeightsFile(arrays, sets.claimed_accuracy(facts))


def _arrays(found: Mapping[str, Any], path: Path) -> dict[str, np.ndarray]:
    """The arrays of a set as NumPy has them."""
    tensors = {name: value for name, value in found.items() if not isinstance(value, np.ndarray)}
    if tensors:
        found = {**found, **as_arrays(tensors, path)}
    return {name: _float32(array) for name, array in found.items()}


def _differs(other: Mapping[str, Any], arrays: dict[str, np.ndarray], path: Path) -> bool:
    """Whether another set has other numbers; the best model of a training is often the last."""
    try:
        theirs = list(_arrays(other, path).values())
    except InputError:
        return True
    ours = list(arrays.values())
    return len(ours) != len(theirs) or not all(map(np.array_equal, ours, theirs))


def check_content(path: Path) -> None:
    """Raise `InputError` if there is no such file, or what a failed download leaves."""
    if not path.exists():
        raise InputError(f"there is no weights file at {path}")
    if not path.is_file():
        raise InputError(f"{path} is no file, but a folder, a pipe or a device; give a file")
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise InputError(f"{path} is empty")
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    for beginning, description in _NOT_WEIGHTS.items():
        if b"\0" not in start and re.match(beginning, text):
            raise InputError(f"{path} is {description}")


def _float32(array):
    # "V" is what NumPy calls bfloat16 and the 8-bit floats, which it does not know itself.
    return array.astype(np.float32) if array.dtype.kind in "fV" else array


def _read_torch(path):
    content = read_content(path)
    return content, content


def _read_safetensors(path):
    import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16, which safetensors looks up by name)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return arrays, file.metadata()
    except (SafetensorError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise damaged(path, first_line(error)) from error
    except (AttributeError, TypeError, KeyError) as error:
        raise InputError(f"{path} has weights of a type NumPy does not know: {error}") from error


def _read_keras(path):
    from moth_jax.models.weights.keras_file import read_keras

    return read_keras(path), None


# Each returns the content of a file, arrays by their names, which may be nested; and the mapping in
# which it may say what accuracy they have.
READERS = {
    **dict.fromkeys((".th", ".pt", ".pth", ".tar"), _read_torch),
    ".safetensors": _read_safetensors,
    **dict.fromkeys((".h5", ".hdf5"), _read_keras),
}
