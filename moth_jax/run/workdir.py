"""The work folder: one run at a time works in it, and it belongs to one configuration."""

import contextlib
import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from moth_jax.errors import InputError
from moth_jax.parallel.processes import broadcast_from_main
from moth_jax.run.configuration import as_json, decisive, default_config
from moth_jax.run.phases import PHASES
from moth_jax.storage.files import read_own_json, write_json

CONFIG, METRICS, SUMMARY, REPORT = "config.json", "metrics.jsonl", "summary.json", "report.html"
_OF_THE_RUN = ("tensorboard", METRICS, SUMMARY, REPORT)

_LOCK = ".lock"
_WAIT_SECONDS = 10.0  # a process that was killed may take some to give its devices back
_RETRY_SECONDS = 0.1
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[Callable[[], None]]:
    """Keep other runs out of `workdir`, which is made, while the block runs.

    The block gets a function that raises `InputError` if the folder is not there any more, or is
    another one.

    The main process holds the lock, and the system releases it when that process ends, in whatever
    way. A file system without locks is used without one.

    Raises:
      InputError: another run has the folder, or it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        broadcast_from_main(_lock, workdir, stack)
        ours = broadcast_from_main(_identity, workdir)
        yield lambda: broadcast_from_main(_check_there, workdir, ours)


def _lock(workdir: Path, stack: contextlib.ExitStack) -> None:
    """Lock `workdir` until `stack` is closed."""
    _make_folder(workdir)
    # Its substitute for a missing lock is a file, which would outlive a process that is killed.
    lock = FileLock(workdir / _LOCK, fallback_to_soft=False)
    try:
        lock.acquire(timeout=_WAIT_SECONDS, poll_interval=_RETRY_SECONDS)
    except Timeout:
        raise InputError(
            f"another process works in {workdir}; wait for it or choose another --workdir; for "
            "several processes together give --coordinator"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    stack.callback(lock.release)


def _identity(workdir: Path) -> tuple[int, int]:
    """Return what tells a folder from another of its name."""
    status = workdir.stat()
    return status.st_dev, status.st_ino


def _check_there(workdir: Path, ours: tuple[int, int]) -> None:
    if not workdir.is_dir() or _identity(workdir) != ours:
        raise InputError(
            f"{workdir} was removed or replaced while the run worked in it; bring it back, and the "
            "same command goes on, or begins anew"
        )


def _make_folder(workdir: Path) -> None:
    """Make the folder unless it is there."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot use {workdir} as --workdir: {error.strerror}") from error


def claim(workdir: Path, ours: dict, *, overwrite: bool) -> None:
    """Let `workdir` belong to the run of a configuration, or find that it does.

    A run without any result (a path was mistyped, say) gives way to another configuration.

    Args:
      workdir: the work folder, made if it is not there.
      ours: the configuration (`configuration.as_json`).
      overwrite: remove the results of a run that is there.

    Raises:
      InputError: it holds another run and `overwrite` is not set, or files with a run's names
        without a run's configuration, or it cannot be written.
    """
    _make_folder(workdir)
    path = workdir / CONFIG
    results = _results(workdir)
    if results and not path.exists():
        raise InputError(
            f"{workdir} holds {', '.join(item.name for item in results)}, but not the config.json "
            "of a run; choose another --workdir, or move them away"
        )
    if results and not overwrite:
        changed = changed_fields(read_own_json(path), ours)
        if changed:
            raise InputError(
                f"{workdir} holds a run with another configuration (different: "
                f"{', '.join(changed)}); choose another --workdir, or --overwrite to start afresh"
            )
        return
    for item in results:
        if item.is_dir():
            shutil.rmtree(item)
        else:
            item.unlink()
    # Last: whatever is left of an interrupted removal still belongs to the run it names.
    write_json(path, ours)


def _results(workdir: Path) -> list[Path]:
    """Return what a run has left in `workdir`, folders first; an empty file counts as nothing."""
    of_phases = (name for phase in PHASES.values() for name in phase.files)
    paths = [workdir / name for name in dict.fromkeys((*of_phases, *_OF_THE_RUN))]
    left = [path for path in paths if path.is_dir() or (path.exists() and path.stat().st_size)]
    return sorted(left, key=lambda path: not path.is_dir())


def changed_fields(theirs: dict, ours: dict) -> list[str]:
    """Return the names of the fields that differ between two configurations, in one dict each.

    A field that `theirs` lacks, because it is newer, had its default.
    """
    theirs, ours, defaults = map(decisive, (theirs, ours, as_json(default_config())))
    theirs = {**{name: defaults[name] for name in ours.keys() & defaults.keys()}, **theirs}
    missing = object()
    return sorted(
        name
        for name in ours.keys() | theirs.keys()
        if ours.get(name, missing) != theirs.get(name, missing)
    )
