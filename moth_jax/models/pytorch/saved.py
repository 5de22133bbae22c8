"""What `torch.save` wrote, as named arrays, and nothing in it is run. Needs torch."""

import contextlib
import pickle
import pickletools
import re
import tarfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moth_jax.errors import InputError, first_line, listed

_TRUST = " with --trust=torchvision (in a run --config.model.trust=torchvision)"
# What files of weights ask for.
_HARMLESS = re.compile(r"torch\._utils\..*|torch\.storage\..*|torch\.\w+|collections\.OrderedDict")
# Views of one small storage, which honest files have a few of, beyond a number for each byte.
_EXTRA_NUMBERS = 1 << 20


def read_content(path: Path) -> Any:
    """What `torch.load` makes of a file of numbers, lists and dicts alone.

    Raises:
      InputError: torch is missing, the file would run code when read, or is damaged.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            f"reading {path.name} needs PyTorch: pip install 'moth-jax[torch]'; "
            "or save the weights as safetensors, which need nothing"
        ) from None
    check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is then refused in our words
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from error
    except Exception as error:  # of any kind: a damaged pickle does as it likes
        raise damaged(path, first_line(error)) from error


def damaged(path: Path, reason: str) -> InputError:
    """The error of a file whose bytes are not what was written."""
    return InputError(f"{path} is truncated or damaged ({reason}); get it again")


def check_archive(path: Path) -> None:
    """Raise `InputError` for an archive that PyTorch did not write, or that is damaged.

    PyTorch itself reads a zip archive without looking at its checksums.
    """
    try:
        if not _is_zip(path):
            if tarfile.is_tarfile(path):  # of before 2017; since then one pickle after another
                raise InputError(
                    f"{path} is a tar archive; extract it and give the file of weights in it, or "
                    "save the state_dict of the module with torch.save"
                )
            return
        with zipfile.ZipFile(path) as archive:
            if any(name.rpartition("/")[2] == "constants.pkl" for name in archive.namelist()):
                raise InputError(
                    f"{path} is a TorchScript archive, which holds code; "
                    "save the state_dict of the original module"
                )
            check_parts(path, archive)
            bad = archive.testzip()
    except InputError:
        raise
    except Exception as error:  # of half a dozen kinds
        raise damaged(path, first_line(error)) from error
    if bad:
        raise damaged(path, f"wrong checksum of {bad!r}")


def check_parts(path: Path, archive: zipfile.ZipFile) -> None:
    """Raise `InputError` for names that come twice, and for parts that are larger than the file.

    PyTorch writes each part once and does not compress.
    """
    parts = archive.infolist()
    counts = Counter(part.filename.lower() for part in parts)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise InputError(f"{path} is refused: it holds {listed(twice)} more than once")
    total = sum(part.file_size for part in parts)
    size = path.stat().st_size
    if total > size:
        raise InputError(
            f"{path} is refused: a file of {size} bytes whose parts are {total} bytes long, and "
            "PyTorch does not compress; write it again with PyTorch"
        )


def _is_zip(path: Path) -> bool:
    """Whether PyTorch reads a file as an archive; it looks at the beginning alone."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _refused(path, error):
    wanted = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error))
    name = wanted[1] if wanted else next(_foreign_globals(path), "")
    if not name:
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
    with contextlib.suppress(Exception):  # it is no pickle
        strings = []
        for opcode, argument, _ in pickletools.genops(_pickle_in(path)):
            if isinstance(argument, str):
                strings.append(argument)
            if opcode.name in ("GLOBAL", "STACK_GLOBAL"):
                parts = strings[-2:] if opcode.name == "STACK_GLOBAL" else strings[-1].split()
                name = "".join(filter(str.isprintable, ".".join(parts)))[:100]
                if not _HARMLESS.fullmatch(name):
                    yield name


def _pickle_in(path):
    if not _is_zip(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        parts = [name for name in archive.namelist() if name.endswith("data.pkl")]
        return archive.read(parts[0]) if parts else b""


def as_arrays(tensors: Mapping[str, Any], path: Path) -> dict[str, np.ndarray]:
    """Tensors as arrays; floating ones as float32, for NumPy lacks the other kinds.

    Raises:
      InputError: some are no plain arrays, or claim more numbers than the file can hold.
    """
    for name, tensor in tensors.items():
        kind = _unusual(tensor)
        if kind:
            raise InputError(
                f"{path} holds {name!r} as a {kind} tensor, which is no plain array of numbers; "
                "save the state_dict of the original module"
            )
    numbers, size = sum(tensor.numel() for tensor in tensors.values()), path.stat().st_size
    if numbers > size + _EXTRA_NUMBERS:
        raise InputError(
            f"{path} is refused: a file of {size} bytes whose tensors claim {numbers} numbers"
        )
    return {name: _array(name, tensor, path) for name, tensor in tensors.items()}


def _unusual(tensor) -> str:
    """What a tensor is, if NumPy has nothing like it; else an empty string."""
    kinds = {
        "nested": tensor.is_nested,
        "meta (without values)": tensor.is_meta,
        "quantised": tensor.is_quantized,
        "sparse": str(tensor.layout) != "torch.strided",
        "complex": tensor.is_complex(),
    }
    return next((kind for kind, found in kinds.items() if found), "")


def _array(name: str, tensor, path: Path) -> np.ndarray:
    try:
        tensor = tensor.detach().resolve_neg()
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    except (TypeError, RuntimeError) as error:  # numbers of 4 bits and the like
        raise InputError(
            f"{path} holds {name!r} as {tensor.dtype}, which is no type of NumPy; save the "
            "state_dict of the original module"
        ) from error
