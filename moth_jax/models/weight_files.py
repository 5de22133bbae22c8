"""Files of weights to named NumPy arrays. Nothing is ever unpickled freely."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moth_jax.errors import InputError

# Where checkpoints of training scripts keep the weights, beside optimizer state and counters.
_NESTED = ("state_dict", "model_state_dict", "model", "net", "weights")


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """All arrays of a file by name; floating ones as float32.

    PyTorch (.th, .pt, .pth, .tar; needs torch), safetensors, or Keras 2 HDF5 (.h5, .hdf5). A nested
    `state_dict` is unwrapped and the `module.` of DataParallel removed. Keras layers are numbered
    anew from 1 (`conv2d_1/kernel`), because Keras counts on over all models of a process.

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
    if not path.is_file():
        raise InputError(f"no weights file at {str(path)!r}")
    weights = {name: _float32(array) for name, array in reader(path).items()}
    if not weights:
        raise InputError(f"{str(path)!r} contains no arrays")
    faulty = sorted(name for name, array in weights.items() if not np.isfinite(array).all())
    if faulty:
        raise InputError(f"{str(path)!r} has NaN or infinite values in {', '.join(faulty)}")
    return weights


def _float32(array):
    return array.astype(np.float32) if array.dtype.kind in "fV" else array


def _read_torch(path):
    import torch

    content = torch.load(path, map_location="cpu", weights_only=True)
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)}
    return {
        name.removeprefix("module."): (v.float() if v.is_floating_point() else v).numpy()
        for name, v in tensors.items()
    }


def _read_safetensors(path):
    from safetensors.numpy import load_file

    return {name.removeprefix("module."): array for name, array in load_file(path).items()}


def _read_keras(path):
    import h5py

    arrays = {}
    with h5py.File(path, "r") as file:
        root = file["model_weights"] if "model_weights" in file else file

        def visit(name, item):
            if isinstance(item, h5py.Dataset):
                layer, weight = name.split("/")[0], name.split("/")[-1]
                arrays[layer, weight.split(":")[0]] = np.asarray(item)

        root.visititems(visit)
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
    **dict.fromkeys((".th", ".pt", ".pth", ".tar"), _read_torch),
    ".safetensors": _read_safetensors,
    **dict.fromkeys((".h5", ".hdf5"), _read_keras),
}
