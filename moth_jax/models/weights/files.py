"""Files of weights to named NumPy arrays. Nothing is ever unpickled freely."""

import contextlib
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moth_jax.errors import InputError
from moth_jax.models.classifier import Claim
from moth_jax.models.values import check_values
from moth_jax.models.weights import sets

_TRUST = " with --trust=torchvision (in a run --config.model.trust=torchvision)"
# What files of weights ask for.
_HARMLESS = re.compile(r"torch\._utils\..*|torch\.storage\..*|torch\.\w+|collections\.OrderedDict")
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
        from moth_jax.models.weights.torch_arrays import as_arrays

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
    if not path.is_file():
        raise InputError(f"there is no weights file at {path}")
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
    return content, content


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


def _read_safetensors(path):
    import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16, which safetensors looks up by name)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return arrays, file.metadata()
    except (SafetensorError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise _damaged(path, error) from error
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
