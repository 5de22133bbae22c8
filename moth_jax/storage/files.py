"""Files that are written whole or not at all, and read without running anything: JSON and npz."""

import contextlib
import hashlib
import json
import math
import os
import stat
import sys
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from moth_jax.errors import InputError, first_line
from moth_jax.parallel.processes import broadcast_from_main, on_main
from moth_jax.typed import fault_of, shown


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
    with replaced_file(Path(path)) as file:
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]


# A file may unpack to this much, or to this many times its size: a small one to no more memory than
# any machine has, and arrays of black images, which pack well, to all they need.
UNPACKED_LIMIT = 2**28
_MOST_PACKED = 100


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a file to read it, unless it is a pipe, a device or a socket, which may never end.

    Raises:
      InputError: it is no regular file.
      OSError: it is not there, or cannot be opened.
    """
    # Opening a pipe would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise InputError(f"{path} is no regular file, but a pipe, a device or a socket")
    return file


def load_npz(
    path: str | os.PathLike, *, advice: str = "", unpacked_limit: int = UNPACKED_LIMIT
) -> dict[str, np.ndarray]:
    """Read an npz file without unpickling.

    Args:
      path: of the file.
      advice: what to do if it cannot be read.
      unpacked_limit: bytes that its arrays may take in memory; a hundred times the size of the file
        if that is more.

    Raises:
      InputError: the file is missing, damaged or of another kind, holds pickled objects, or unpacks
        to more than it may.
    """
    with _explained(path, advice), open_regular(path) as file:
        limit = max(unpacked_limit, _MOST_PACKED * os.fstat(file.fileno()).st_size)
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            unpacked = sum(member.file_size for member in members)
            if unpacked > limit:
                raise InputError(
                    f"{path} unpacks to {unpacked} bytes, more than the {limit} that a file of its "
                    "size may; is it what you expect it to be?"
                )
            names = [member.filename.removesuffix(".npy") for member in members]
            if len(set(names)) < len(names):
                raise ValueError("it holds several arrays of one name")
            return {
                name: _read_member(archive, member)
                for name, member in zip(names, members, strict=True)
            }


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as file:
        try:
            array = _read_array(file, member.file_size)
            file.read(1)  # at its end the archive finds out whether a byte has changed
        except (ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{member.filename} is damaged: {first_line(error)}") from error
    return array


def load_npy(path: str | os.PathLike, *, advice: str = "") -> np.ndarray:
    """Read the one array of an npy file; all else is as for `load_npz`."""
    with _explained(path, advice), open_regular(path) as file:
        return _read_array(file, os.fstat(file.fileno()).st_size)


def _read_array(file: IO[bytes], size: int) -> np.ndarray:
    """Read an array out of `size` bytes, none of which may be left.

    NumPy asks for the memory that the header speaks of before it reads: it is compared first.
    """
    start = file.tell()
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"version {version} of the format is that of arrays with named fields")
    shape, _, dtype = readers[version](file)
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be read")
    told, left = math.prod(shape) * dtype.itemsize, start + size - file.tell()
    if told != left or min(shape, default=0) < 0 or dtype.itemsize == 0:
        raise ValueError(
            f"its header speaks of {told} bytes, shape {shape} of {dtype}, and {left} follow"
        )
    file.seek(start)
    array = np.lib.format.read_array(file, allow_pickle=False)
    if dtype.kind == "U":  # each letter takes four bytes, of which many mean none
        letters = np.ascontiguousarray(array).reshape(-1).view(dtype.str[0] + "u4")
        if letters.max(initial=0) > sys.maxunicode:
            raise ValueError("its text has letters that there are not")
    return array


@contextlib.contextmanager
def _explained(path: str | os.PathLike, advice: str) -> Iterator[None]:
    """Turn whatever NumPy and zipfile raise for a file into an `InputError` with `advice`."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}") from error
    except Exception as error:  # there is no list of what they raise for damaged files
        if "Object arrays" in str(error):
            raise InputError(
                f"cannot read {path}: Object arrays can only be read by running code from the "
                "file; save plain arrays of numbers or text, all images of one shape"
            ) from error
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"cannot read {path}: {reason}{advice and f'; {advice}'}") from error


Shape = tuple[int | str, ...]


def check_arrays(
    path: str | os.PathLike,
    arrays: Mapping[str, np.ndarray],
    layout: Mapping[str, tuple[str, Shape]],
    *,
    what: str,
    optional: Collection[str] = (),
    advice: str = "",
) -> None:
    """Raise `InputError` unless a file holds the arrays of `layout` and no others.

    Args:
      path: of the file.
      arrays: what it holds.
      layout: (kinds of `dtype.kind`, shape) by name; a letter in a shape is one number throughout.
      what: what a message calls such a file.
      optional: the names that may be missing.
      advice: what to do if they are others.
    """
    sizes: dict[str, int] = {}
    faults = [f"no array {name}" for name in layout if name not in {*arrays, *optional}]
    faults += [f"an unknown array {shown(name)}" for name in arrays if name not in layout]
    for name in [name for name in layout if name in arrays]:
        array, (kinds, shape) = arrays[name], layout[name]
        places = zip(shape, array.shape, strict=False)
        fits = len(shape) == array.ndim and all(
            size == (sizes.setdefault(place, size) if isinstance(place, str) else place)
            for place, size in places
        )
        if array.dtype.kind not in kinds or not fits:
            faults.append(f"{name} is {array.dtype} of shape {array.shape}")
    if faults:
        raise InputError(f"{path} is no {what}, or is damaged: {faults[0]}; {advice}")


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
        with open_regular(path) as file:
            fields = parse_json(file.read())
        fault = fault_of(fields, schema)
    except ValueError as error:
        fault = str(error)
    except OSError as error:
        fault = error.strerror or str(error)
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
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=unique_fields)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def unique_fields(pairs: list[tuple[str, Any]]) -> dict:
    """Return the fields of a JSON object, for `json.loads`; `ValueError` if one occurs twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a field occurs twice")
    return dict(pairs)
