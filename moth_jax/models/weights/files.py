"""Files of weights to named NumPy arrays. Nothing is ever unpickled freely."""

from pathlib import Path

import numpy as np

from moth_jax.errors import InputError
from moth_jax.models.pytorch.saved import read_arrays

# What a failed download often leaves, by its first bytes.
_NOT_WEIGHTS = {
    b"<": "an HTML or XML page, not weights; download the file itself",
    b"version https://git-lfs": "a Git LFS pointer, not weights; run `git lfs pull`",
}


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """All arrays of a file by name; floating ones as float32.

    PyTorch (.th, .pt, .pth, .tar; needs torch), safetensors, or Keras 2 HDF5 (.h5, .hdf5). A nested
    `state_dict` is unwrapped. Keras layers are numbered anew from 1 (`conv2d_1/kernel`), because
    Keras counts on over all models of a process.

    Raises `InputError` for a file that is missing, damaged, of an unknown kind, would run code when
    read, or has NaN or infinite values.
    """
    path = Path(path).expanduser()
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(
            f"cannot read weights from {path.name!r}: the extension must be one of "
            f"{', '.join(sorted(READERS))}"
        )
    check_content(path)
    weights = {name: _float32(array) for name, array in reader(path).items()}
    faulty = sorted(name for name, array in weights.items() if not np.isfinite(array).all())
    if faulty:
        raise InputError(
            f"{path} has NaN or infinite values in {', '.join(faulty)}; a diverged or damaged model"
        )
    return weights


def check_content(path: Path) -> None:
    """Raise `InputError` if there is no such file, or what a failed download leaves."""
    if not path.is_file():
        raise InputError(f"there is no weights file at {path}")
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise InputError(f"{path} is empty")
    for beginning, description in _NOT_WEIGHTS.items():
        if start.lstrip().startswith(beginning):
            raise InputError(f"{path} is {description}")


def _float32(array):
    # "V" is what NumPy calls bfloat16 and the 8-bit floats, which it does not know itself.
    return array.astype(np.float32) if array.dtype.kind in "fV" else array


def _damaged(path, error):
    reason = [*str(error).strip().splitlines(), "unexpected end of file"][0]
    return InputError(f"{path} is truncated or damaged ({reason}); get it again")


def _read_safetensors(path):
    import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16, which safetensors looks up by name)
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    except (AttributeError, TypeError, KeyError) as error:
        raise InputError(f"{path} has weights of a type NumPy does not know: {error}") from error


def _read_keras(path):
    import h5py

    arrays = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            layer, weight = name.split("/")[0], name.split("/")[-1]
            arrays[layer, weight.split(":")[0]] = np.asarray(item)

    try:
        with h5py.File(path, "r") as file:
            weights = file.get("model_weights")
            root = weights if isinstance(weights, h5py.Group) else file
            if "layers" in root:
                raise InputError(
                    f"{path} is in the layout of Keras 3; only that of Keras 2 is known "
                    "(model.save('x.h5') or save_weights('x.h5') there)"
                )
            root.visititems(visit)
    except (OSError, RuntimeError, KeyError) as error:
        raise _damaged(path, error) from error
    if not arrays:
        raise InputError(f"{path} contains no weights")
    numbered = _numbered_from_one({layer for layer, _ in arrays})
    return {f"{numbered[layer]}/{weight}": array for (layer, weight), array in arrays.items()}


def _numbered_from_one(layers):
    """`conv2d_8`, `conv2d_9` to `conv2d_1`, `conv2d_2`, for each kind of layer."""

    def parts(layer):
        kind, _, number = layer.rpartition("_")
        return (kind, int(number)) if kind and number.isdigit() else (layer, 0)

    renamed, counts = {}, {}
    for layer in sorted(layers, key=parts):
        kind = parts(layer)[0]
        counts[kind] = counts.get(kind, 0) + 1
        renamed[layer] = f"{kind}_{counts[kind]}"
    return renamed


READERS = {
    **dict.fromkeys((".th", ".pt", ".pth", ".tar"), read_arrays),
    ".safetensors": _read_safetensors,
    **dict.fromkeys((".h5", ".hdf5"), _read_keras),
}
