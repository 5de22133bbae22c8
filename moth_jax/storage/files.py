"""Files that are written whole or not at all, and read without running anything: JSON and npz."""

import contextlib
import hashlib
import json
import math
import os
import textwrap
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from moth_jax.errors import InputError, listed
from moth_jax.parallel.processes import broadcast_from_main, on_main
from moth_jax.typed import fault_of


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


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Write a file whole or not at all, also if the process is killed.

    Raises:
      InputError: it cannot be written; what was there before is untouched.
    """
    with _replaced_file(Path(path)) as file:
        file.write(content)


@contextlib.contextmanager
def _replaced_file(path: Path) -> Iterator[BinaryIO]:
    """Give the block a file to write, which is at `path` after it; before, the old one stays."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> InputError:
    """Return the fault that says what to do about a file or folder that cannot be written."""
    return InputError(
        f"cannot write {path}: {error.strerror or error}; free some space or check the "
        "permissions, then run the same command again"
    )


def save_npz(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """Write `arrays` to an npz file, whole or not at all, also if the process is killed.

    Raises:
      InputError: it cannot be written; what was there before is untouched.
    """
    with _replaced_file(Path(path)) as file:
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]


def load_npz(path: str | os.PathLike, *, advice: str = "") -> dict[str, np.ndarray]:
    """Read an npz file without unpickling; `advice` says what to do if that is impossible.

    Raises:
      InputError: the file is missing, damaged or of another kind, or holds pickled objects.
    """
    try:
        _check_regular(Path(path))
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            if len(set(names)) < len(names):
                raise zipfile.BadZipFile("it has two arrays of one name")
            damaged = archive.testzip()  # checks every byte before NumPy interprets any
            if damaged is not None:
                raise zipfile.BadZipFile(f"{damaged} is damaged")
            for member in members:
                with archive.open(member) as file:
                    _check_size(file, member.file_size)
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception as error:  # of zipfile, zlib and NumPy, which each have many
        raise _cannot_read(path, error, advice) from error


def load_npy(path: str | os.PathLike, *, advice: str = "") -> np.ndarray:
    """Read the one array of an npy file; all else is as for `load_npz`."""
    try:
        _check_regular(Path(path))
        with open(path, "rb") as file:
            _check_size(file, os.path.getsize(path))
            file.seek(0)
            return np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:
        raise _cannot_read(path, error, advice) from error


def _check_regular(path: Path) -> None:
    """Raise `OSError` for what is there and no file: to open a pipe would wait for ever."""
    if path.exists() and not path.is_file():
        raise OSError("it is no regular file")


_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def _check_size(file: IO[bytes], num_bytes: int) -> None:
    """Raise `ValueError` unless an npy file of `num_bytes` holds the array that it speaks of."""
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"it is of version {version}, and known are {listed([*_HEADERS])}")
    shape, _, dtype = _HEADERS[version](file)
    there = num_bytes - file.tell()
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize != there:
        raise ValueError(f"it holds {there:,} bytes, but speaks of {dtype} of shape {shape}")


def _cannot_read(path: str | os.PathLike, error: Exception, advice: str) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"there is no file {path}")
    if "Object arrays" in str(error):
        return InputError(
            f"cannot read {path}: Object arrays can only be read by running code from the file; "
            "save plain arrays of numbers or text, all images of one shape"
        )
    reason = textwrap.shorten(str(error) or type(error).__name__, 300)
    return InputError(f"cannot read {path}: {reason}{advice and f'; {advice}'}")


def json_text(value: Any, **options: Any) -> str:
    """Return strict JSON with letters of all scripts; what cannot be shown is escaped.

    >>> print(json_text({"name": "café\\x9b"}))
    {"name": "café\\u009b"}
    """
    text = json.dumps(strict_json(value), allow_nan=False, ensure_ascii=False, **options)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def write_json(path: str | os.PathLike, fields: Mapping) -> None:
    """Write `fields` as strict JSON, whole or not at all; NaN becomes null, infinity "inf".

    Of several processes only the main one writes.

    Raises:
      InputError: the file cannot be written.
    """
    on_main(write_atomically, path, json_text(fields, indent=2).encode() + b"\n")


def read_json(path: Path, schema: type | None = None) -> dict:
    """Return what `write_json` wrote, {} if there is no such file.

    Of several processes the main one reads, and tells the others.

    Args:
      path: the file.
      schema: a dataclass with the fields that the file must have; any fields if None.

    Raises:
      InputError: the file is damaged, or its fields are not those of `schema`.
    """
    return broadcast_from_main(read_own_json, path, schema)


def read_own_json(path: Path, schema: type | None = None) -> dict:
    """Return what `read_json` returns, read by this process and told to no other."""
    if not path.exists():
        return {}
    try:
        _check_regular(path)
        fields = parse_json(path.read_text(encoding="utf-8"))
        fault = fault_of(fields, schema)
    except (ValueError, OSError) as error:
        fault = str(error)
    if fault is not None:
        raise _damaged(path, fault)
    return fields


def write_record(path: str | os.PathLike, fields: Mapping) -> None:
    """Write `fields` as `write_json` does, with a checksum of them."""
    write_json(path, {**fields, _CHECKSUM: _checksum(fields)})


def read_record(path: Path, schema: type | None = None) -> dict:
    """Return what `write_record` wrote, {} if there is no such file; else as `read_json`."""
    return broadcast_from_main(_read_own_record, path, schema)


def _read_own_record(path: Path, schema: type | None) -> dict:
    fields = read_own_json(path)
    if not fields:
        if path.exists():
            raise _damaged(path, "it is empty")
        return {}
    if fields.pop(_CHECKSUM, None) != _checksum(fields):
        raise _damaged(path, "wrong or missing checksum")
    fault = fault_of(fields, schema)
    if fault is not None:
        raise _damaged(path, fault)
    return fields


_CHECKSUM = "sha256"


def _checksum(fields: Mapping) -> str:
    return hashlib.sha256(json_text(fields, sort_keys=True).encode()).hexdigest()


def _damaged(path: Path, fault: str) -> InputError:
    return InputError(
        f"{path} is damaged: {fault}; bring back the file as it was, move it away, or choose "
        "another --workdir"
    )


def parse_json(text: str | bytes) -> Any:
    """Return what strict JSON says.

    Raises:
      ValueError: it is no strict JSON, or names a field twice.
    """
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a field occurs twice")
    return dict(pairs)
