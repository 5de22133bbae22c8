"""Damaged copies of a valid file, the same ones at every run, and what a reader makes of them.

`mutations` damages bytes as disks, networks and people do. `mutated_parts` damages the inside of a
zip archive and gives each part its right checksum, so that the damage reaches the reader of the
part. `mutated_json` replaces, removes and doubles single values.
"""

import copy
import io
import json
import random
import resource
import signal
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from moth_jax.errors import InputError

_ODD = (
    None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e308, float("nan"), float("-inf"), 2**31, -(2**63),
    10**30, "", "x", "0", "../x", "\x00", "\ud800", "é" * 300, [], {}, [None], [[]], {"a": 1},
    [-1, -1], [0, 0, 0], [2**40] * 3,
)  # fmt: skip


def _flip_bits(data: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def _replace_bytes(data: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.choice((1, 1, 4, 16))):
        data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return data


def _truncate(data: bytearray, rng: random.Random) -> bytearray:
    return data[: rng.randrange(len(data))]


def _insert(data: bytearray, rng: random.Random) -> bytearray:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 2, 7, 64))) + data[at:]


def _remove(data: bytearray, rng: random.Random) -> bytearray:
    start, stop = _block(data, rng)
    return data[:start] + data[stop:]


def _zero(data: bytearray, rng: random.Random) -> bytearray:
    start, stop = _block(data, rng)
    data[start:stop] = bytes(stop - start)
    return data


def _double(data: bytearray, rng: random.Random) -> bytearray:
    start, stop = _block(data, rng)
    return data[:stop] + data[start:stop] + data[stop:]


def _swap(data: bytearray, rng: random.Random) -> bytearray:
    a, b, c, d = sorted(rng.randrange(len(data) + 1) for _ in range(4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _append(data: bytearray, rng: random.Random) -> bytearray:
    return data + rng.randbytes(rng.choice((1, 100)))


_DAMAGES = (
    _flip_bits, _flip_bits, _replace_bytes, _truncate, _insert, _remove, _zero, _double, _swap,
    _append,
)  # fmt: skip


def _block(data: bytearray, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(data))
    return start, min(len(data), start + rng.choice((1, 4, 16, 512)))


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The content with one damage."""
    return bytes(rng.choice(_DAMAGES)(bytearray(content or b"\0"), rng))


def mutations(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """`count` damaged copies of a file's content."""
    rng = random.Random(seed)
    return (damaged(content, rng) for _ in range(count))


def mutated_parts(
    content: bytes, count: int, seed: int = 0, choose: Callable[[str], bool] = bool
) -> Iterator[bytes]:
    """`count` copies of a zip archive, one part of each damaged; `choose` says which may be.

    A part that is JSON is damaged in its values as often as in its bytes.
    """
    rng = random.Random(seed)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = [(info.filename, archive.read(info)) for info in archive.infolist()]
    chosen = [i for i, (name, _) in enumerate(parts) if choose(name)]
    for _ in range(count):
        index = rng.choice(chosen)
        name, part = parts[index]
        if name.endswith(".json") and rng.random() < 0.5:
            part = json.dumps(mutated_json(json.loads(part), rng)).encode()
        else:
            part = damaged(part, rng)
        yield zipped([*parts[:index], (name, part), *parts[index + 1 :]])


def zipped(parts: Iterable[tuple[str, bytes]]) -> bytes:
    """An archive of the parts as they are; names may come twice."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that come twice
        for name, part in parts:
            archive.writestr(name, part)
    return buffer.getvalue()


def mutated_json(value: Any, rng: random.Random) -> Any:
    """A copy in which one value, anywhere, is replaced, removed, doubled or moved."""
    value = copy.deepcopy(value)
    places = [*_places(value)]
    if not places:
        return copy.deepcopy(rng.choice(_ODD))
    holder, key = rng.choice(places)
    match rng.randrange(6):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        case 1:
            holder[f"{key}x"] = holder.pop(key)
        case 2:
            other, other_key = rng.choice(places)
            holder[key] = copy.deepcopy(other[other_key])
        case 3 if isinstance(holder[key], int | float):
            holder[key] = rng.choice((-holder[key], holder[key] + 1, 10**9, -(10**9), 10**400))
        case _:
            holder[key] = copy.deepcopy(rng.choice(_ODD))
    return value


def _places(value) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) inside a value."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


class Counts(NamedTuple):
    """How a reader met damaged inputs: every one was refused in one line, or gave a result."""

    tried: int
    refused: int
    accepted: int


def read_all(
    inputs: Iterable, read: Callable, *, seconds: float = 5, megabytes: int = 500
) -> Counts:
    """Give each of the inputs to `read`.

    Fails if an exception is no `InputError`, if a message has more than one line, if one input
    takes longer than `seconds`, or if all together raise the peak of memory by `megabytes`.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = accepted = 0
    previous = signal.signal(signal.SIGALRM, _too_long)
    try:
        for index, item in enumerate(inputs):
            signal.setitimer(signal.ITIMER_REAL, seconds)
            try:
                read(item)
                accepted += 1
            except InputError as error:
                refused += 1
                if "\n" in str(error):
                    raise AssertionError(f"input {index}: {error}") from error
            except BaseException as error:
                error.add_note(f"input {index} of this format")
                raise
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, previous)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert peak < megabytes, f"the memory's peak rose by {peak:.0f} MB"
    return Counts(refused + accepted, refused, accepted)


class TooLongError(BaseException):
    """No reader turns it into a message of its own."""


def _too_long(*_):
    raise TooLongError("a reader takes too long")
