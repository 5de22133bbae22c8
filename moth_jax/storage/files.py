"""Files that are written whole or not at all, and read without running anything: JSON and npz."""

import contextlib
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moth_jax.errors import InputError
from moth_jax.parallel.processes import broadcast_from_main, on_main


def strict_json(value) -> Any:
    """Return `value` as what strict JSON can carry: NaN is None, infinities are "inf" and "-inf".

    Takes dicts, lists, tuples, paths, and numbers and arrays of NumPy or JAX.

    >>> strict_json({"size": np.float32("inf"), "sizes": np.array([1.0, np.nan])})
    {'size': 'inf', 'sizes': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {str(k): strict_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [strict_json(v) for v in value]
    if hasattr(value, "tolist"):  # of NumPy and JAX
        return strict_json(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return str(value) if isinstance(value, os.PathLike) else value


def write_atomically(path: str | os.PathLike, content: bytes | bytearray) -> None:
    """Write a file whole or not at all, also if the process is killed.

    Raises:
      InputError: it cannot be written; what was there before is untouched.
    """
    with replaced_file(Path(path)) as file:
        file.write(content)


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """Give the block a file to write, which is at `path` after it; before, the old one stays."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def _cannot_write(path: Path, error: OSError) -> InputError:
    return InputError(
        f"cannot write {path}: {error.strerror or error}; free some space or check the "
        "permissions, then run the same command again"
    )


# What zipfile, zlib and NumPy raise for files of another kind, damaged, or with pickled objects.
_UNREADABLE = (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


def save_npz(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """Write `arrays` to an npz file, whole or not at all, also if the process is killed.

    Raises:
      InputError: it cannot be written; what was there before is untouched.
    """
    with replaced_file(Path(path)) as file:
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]


def load_npz(path: str | os.PathLike, *, advice: str = "") -> dict[str, np.ndarray]:
    """Read an npz file without unpickling; `advice` says what to do if that is impossible.

    Raises:
      InputError: the file is missing, damaged or of another kind, or holds pickled objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # checks every byte before NumPy interprets any
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} is damaged")
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except _UNREADABLE as error:
        raise _cannot_read(path, error, advice) from error


def load_npy(path: str | os.PathLike, *, advice: str = "") -> np.ndarray:
    """Read the one array of an npy file; all else is as for `load_npz`."""
    try:
        with open(path, "rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except _UNREADABLE as error:
        raise _cannot_read(path, error, advice) from error


def _cannot_read(path: str | os.PathLike, error: Exception, advice: str) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"there is no file {path}")
    if "Object arrays" in str(error):
        return InputError(
            f"cannot read {path}: Object arrays can only be read by running code from the file; "
            "save plain arrays of numbers or text, all images of one shape"
        )
    return InputError(f"cannot read {path}: {error}{advice and f'; {advice}'}")


def write_json(path: str | os.PathLike, fields: Mapping) -> None:
    """Write `fields` as strict JSON, whole or not at all; NaN becomes null, infinity "inf".

    Of several processes only the main one writes.

    Raises:
      InputError: the file cannot be written.
    """
    text = json.dumps(strict_json(fields), indent=2, allow_nan=False, ensure_ascii=False)
    on_main(write_atomically, path, text.encode() + b"\n")


def read_json(path: Path) -> dict:
    """Return what `write_json` wrote, {} if there is no such file.

    Of several processes the main one reads, and tells the others.

    Raises:
      InputError: the file is damaged.
    """
    return broadcast_from_main(read_own_json, path)


def read_own_json(path: Path) -> dict:
    """Return what `read_json` returns, read by this process and told to no other."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise InputError(
            f"{path} is damaged: {error}; choose another --workdir, or move the file away"
        ) from error
