"""Files of weights to named NumPy arrays. Nothing is ever unpickled freely."""

import contextlib
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moth_jax.errors import InputError

# Where training scripts keep the weights, beside the optimizer's state and counters.
_NESTED = ("state_dict", "model_state_dict", "model", "net", "weights")
_TRUST = " with --trust=torchvision (in a run --config.model.trust=torchvision)"
# What files of weights ask for.
_HARMLESS = re.compile(r"torch\._utils\..*|torch\.storage\..*|torch\.\w+|collections\.OrderedDict")
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


def _read_torch(path):
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            f"reading {path.name} needs PyTorch: pip install 'moth-jax[torch]'; "
            "or save the weights as safetensors, which need nothing"
        ) from None
    _check_zip(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is then refused in our words
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise _damaged(path, error) from error
    tensors = {
        name: tensor.detach()
        for name, tensor in _unwrapped(content, path).items()
        if isinstance(tensor, torch.Tensor)
    }
    return {k: (t.float() if t.is_floating_point() else t).numpy() for k, t in tensors.items()}


def _check_zip(path):
    """PyTorch itself reads a zip archive without looking at its checksums."""
    if not zipfile.is_zipfile(path):
        return  # the format before 2020
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            names = [name.rpartition("/")[2] for name in archive.namelist()]
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise _damaged(path, error) from error
    if damaged:
        raise _damaged(path, f"wrong checksum of {damaged}")
    if "constants.pkl" in names:
        raise InputError(
            f"{path} is a TorchScript archive, which holds code; "
            "save the state_dict of the original module"
        )


def _refused(path, error):
    wanted = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error))
    name = wanted[1] if wanted else next(_foreign_globals(path), None)
    if name is None:
        return InputError(
            f"{path} is refused: not a PyTorch file of weights alone, or damaged; get it again, or "
            "save the state_dict of the module with torch.save"
        )
    module = name.startswith(("torch.nn.", "torchvision."))
    return InputError(
        f"{path} is refused: it contains more than weights ({name}), and reading that can run "
        "any code; save the state_dict of the module with torch.save instead"
        + (", or read a whole module of torchvision's classes" + _TRUST if module else "")
    )


def _foreign_globals(path):
    """What a pickle that PyTorch does not follow, such as one of protocol 4, asks for by name."""
    with contextlib.suppress(ValueError, OSError, zipfile.BadZipFile):  # it is no pickle
        strings = []
        for opcode, argument, _ in pickletools.genops(_pickle_in(path)):
            if isinstance(argument, str):
                strings.append(argument)
            if opcode.name in ("GLOBAL", "STACK_GLOBAL"):
                parts = strings[-2:] if opcode.name == "STACK_GLOBAL" else strings[-1].split()
                name = ".".join(parts)
                if not _HARMLESS.fullmatch(name):
                    yield name


def _pickle_in(path):
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        parts = [name for name in archive.namelist() if name.endswith("data.pkl")]
        return archive.read(parts[0]) if parts else b""


def _unwrapped(content, path):
    while isinstance(content, Mapping):
        inner = [content[key] for key in _NESTED if isinstance(content.get(key), Mapping)]
        if not inner:
            if not any(hasattr(value, "shape") for value in content.values()):
                break
            return content
        content = inner[0]
    keys = f" with the keys {', '.join(map(str, content))}" if isinstance(content, Mapping) else ""
    raise InputError(
        f"{path} contains no named weights but a {type(content).__name__}{keys}; "
        "save the state_dict of the module"
    )


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
    **dict.fromkeys((".th", ".pt", ".pth", ".tar"), _read_torch),
    ".safetensors": _read_safetensors,
    **dict.fromkeys((".h5", ".hdf5"), _read_keras),
}
