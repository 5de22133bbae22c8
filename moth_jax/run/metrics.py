"""Figures of a run as it goes: `metrics.jsonl`, one JSON object a line, and TensorBoard events.

    with MetricWriter(workdir) as metrics:
        metrics.rewind({"harden": last_saved_step})      # when a run is resumed
        metrics.write("harden", step, loss=0.2, size_forward=54.1)

`metrics.jsonl` is the record. The TensorBoard events are a copy of it, written anew whenever a
writer is opened, so that both agree after a run was killed and resumed.
"""

import errno
import math
import os
import time
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from moth_jax.errors import InputError
from moth_jax.storage.files import (
    cannot_write,
    json_text,
    open_regular,
    parse_json,
    strict_json,
    write_atomically,
)

_SECONDS_BETWEEN_EVENT_FLUSHES = 10.0
_CHECK = "crc"
_RESERVED = ("phase", "step", "time", _CHECK)


class MetricWriter:
    """Appends records to `workdir`/metrics.jsonl and to `workdir`/tensorboard.

    When `write` returns, its line is on disk as a whole. A kill may leave a broken last line; it is
    cut off when the writer is opened.

    Args:
      workdir: the folder.
      of: what the run is told from others by. Lines of another are refused when they are read.

    Raises:
      InputError: the folder cannot be written (also from `write`, when the disk is full, or when
        the file has been removed or replaced).
    """

    def __init__(self, workdir: str | os.PathLike, of: str = ""):
        self._of = of
        self._path = Path(workdir) / "metrics.jsonl"
        self._events_dir = Path(workdir) / "tensorboard"
        self._events = None
        self._last_flush = -float("inf")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def write(self, phase: str, step: int, /, **figures) -> None:
        """Append a record: `phase`, `step`, the time in seconds since 1970, and the figures.

        Figures are numbers (also of NumPy or JAX), strings, or lists of them. TensorBoard gets the
        finite numbers, as `phase/figure`, or `phase/figure/0` and so on for a list.
        """
        if not figures.keys().isdisjoint(_RESERVED):
            raise ValueError(f"figures cannot be called {', '.join(_RESERVED)}; got {figures}")
        record = {"phase": phase, "step": int(step), "time": time.time(), **figures}
        line = _line(record, self._of)
        try:
            # Unbuffered and in one call: a kill leaves whole lines, and a failure shows here.
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._check_there()
            self._write_event(record)
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def _check_there(self) -> None:
        """Raise `OSError` if the file at the path is not the one that is written any more."""
        ours, there = os.fstat(self._file.fileno()), os.stat(self._path)
        if not os.path.samestat(ours, there):
            raise OSError(errno.ESTALE, "it was replaced while the run worked")

    def rewind(self, keep: Mapping[str, int] | Callable[[dict], bool]) -> None:
        """Drop the records that a resumed run will write again.

        Args:
          keep: {phase: last step to keep}; -1 drops a phase, and phases that are not in it are kept
            whole. Or a function from a record to whether it is kept.
        """
        is_kept = partial(_is_within, last_steps=keep) if isinstance(keep, Mapping) else keep
        records = read_metrics(self._path, self._of)
        kept = [record for record in records if is_kept(record)]
        if len(kept) < len(records):
            self.close()
            write_atomically(self._path, b"".join(_line(record, self._of) for record in kept))
            self._open()

    def close(self) -> None:
        """Close the files. Without it the last seconds of events are lost, and nothing else."""
        self._file.close()
        events, self._events = self._events, None
        if events is not None:
            try:
                events.close()
            except OSError as error:
                raise cannot_write(self._events_dir, error) from error

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _open(self) -> None:
        _cut_torn_line(self._path, self._of)
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (closed by close)

    def _write_event(self, record: dict) -> None:
        if self._events is None:
            self._events = _new_events(self._events_dir, read_metrics(self._path, self._of))
        else:
            self._events.write_event(_event(record))
        if time.monotonic() - self._last_flush >= _SECONDS_BETWEEN_EVENT_FLUSHES:
            self._last_flush = time.monotonic()
            self._events.flush()


class NoMetrics:
    """Takes the place of a `MetricWriter` in a process that does not write."""

    def write(self, phase: str, step: int, /, **figures) -> None:
        """Do nothing."""

    def rewind(self, keep: Mapping[str, int] | Callable[[dict], bool]) -> None:
        """Do nothing."""

    def __enter__(self) -> "NoMetrics":
        return self

    def __exit__(self, *_) -> None:
        pass


def read_metrics(path: str | os.PathLike, of: str = "") -> list[dict]:
    """Return the records of a metrics.jsonl, oldest first; none if there is no such file.

    Infinite figures are floats again; a figure that was NaN is None. A broken last line is left
    out: the process was killed while it wrote it.

    Raises:
      InputError: a line before the last is no record of the run `of`, or it is damaged.
    """
    records = [_record(line, of) for line in _content(Path(path)).split(b"\n")[:-1]]
    if records and records[-1] is None:
        del records[-1]
    whole = [record for record in records if record is not None]
    if len(whole) < len(records):
        raise InputError(
            f"line {records.index(None) + 1} of {path} is damaged, or of another run; remove the "
            "line, or the file, which is only the log that curves are drawn from, and run the same "
            "command again"
        )
    return whole


def _content(path: Path) -> bytes:
    if not path.exists():
        return b""
    with open_regular(path) as file:
        return file.read()


def _record(line: bytes, of: str) -> dict | None:
    """Return the record of a line, None if it is broken or of another run."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or record.pop(_CHECK, None) != _check(record, of):
        return None
    return _with_infinities(record) if {*_RESERVED} - {_CHECK} <= record.keys() else None


def _with_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _with_infinities(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_infinities(v) for v in value]
    return float(value) if value in ("inf", "-inf") else value


def _is_within(record: dict, last_steps: Mapping[str, int]) -> bool:
    return record["step"] <= last_steps.get(record["phase"], math.inf)


def _line(record: dict, of: str) -> bytes:
    return json_text({**record, _CHECK: _check(record, of)}).encode() + b"\n"


def _check(record: dict, of: str) -> str:
    """Return the checksum of a record of the run `of`."""
    return f"{zlib.crc32(json_text(record).encode(), zlib.crc32(of.encode())):08x}"


def _cut_torn_line(path: Path, of: str) -> None:
    content = _content(path)
    whole = content.rfind(b"\n") + 1
    last = content.rfind(b"\n", 0, whole - 1) + 1
    if whole and _record(content[last:whole], of) is None:
        whole = last  # otherwise it would be in the middle once there are more
    if whole < len(content):
        os.truncate(path, whole)


def _new_events(folder: Path, records: list[dict]):
    """Return a TensorBoard file with `records`, which replaces those that are there.

    Note: tensorboardX's SummaryWriter would not do. Its queue blocks for ever once its thread has
    met a full disk.
    """
    from tensorboardX.event_file_writer import EventsWriter

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    events = EventsWriter(str(folder / "events"))
    for record in records:
        events.write_event(_event(record))
    return events


def _event(record: dict):
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboardX.proto.summary_pb2 import (
        Summary,  # pyright: ignore[reportAttributeAccessIssue]
    )

    scalars = {
        f"{record['phase']}/{name}": float(value)
        for figure, values in strict_json(record).items()
        if figure not in _RESERVED
        for name, value in _numbered(figure, values)
        if isinstance(value, int | float)
    }
    return Event(
        wall_time=record["time"],
        step=record["step"],
        summary=Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in scalars.items()]),
    )


def _numbered(figure: str, values) -> list[tuple]:
    if isinstance(values, list):
        return [(f"{figure}/{i}", value) for i, value in enumerate(values)]
    return [(figure, values)]
