"""Measure a classifier's class distances, harden it, measure again, show the result.

    python -m moth_jax.main --config=configs/digits.py --workdir=DIR

Any field of the configuration can be set: --config.harden.epochs=4. The same command again goes on
where an earlier one was interrupted. On SIGTERM or SIGUSR1 it saves and ends with exit code 75.
"""

import re
import sys
import textwrap
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from moth_jax.errors import InputError
from moth_jax.run import console, preemption
from moth_jax.run.console import EXIT_INTERRUPTED, EXIT_PREEMPTED, fail
from moth_jax.run.flag_faults import fault_of_config, fault_of_flags, fault_of_unread

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, such as configs/digits.py.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the results.")
_GRACE = flags.DEFINE_float(
    "grace_seconds",
    preemption.GRACE_SECONDS,
    "After SIGTERM or SIGUSR1: seconds to reach a point where a checkpoint can be written.",
    lower_bound=0.0,
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of process 0, where a run of several processes is not started by something that JAX "
    "knows (TPU, SLURM, Open MPI, Kubernetes).",
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Processes of the run; 1 to stay alone in a cluster."
)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "This one's: 0, 1, ...")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Remove the run that is in --workdir first.")


def main(argv: list[str]) -> None:
    """Run the phases; a fault of the input is one line, and exit code 2."""
    del argv  # parse_flags has read it
    console.prepare_console()
    try:
        with preemption.watch(grace_seconds=_GRACE.value):
            _run()
    except InputError as error:
        fail(str(error))
    except OSError as error:
        # A full disk, or a missing right. Nothing of the run is lost.
        fail(
            f"{error.filename or _WORKDIR.value}: {error.strerror or error}; free some space or "
            "check the permissions, then run the same command again"
        )
    except (RuntimeError, MemoryError) as error:
        _fail_if_exhausted(error)
        raise
    except preemption.Preempted as end:
        fail(str(end), code=EXIT_PREEMPTED)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from here", code=EXIT_INTERRUPTED)


def _run() -> None:
    from moth_jax.parallel import devices, processes
    from moth_jax.progress import console_progress, silent_progress
    from moth_jax.run.runner import run

    devices.use_all_cores()
    console.keep_compilations()
    if processes.initialise(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value):
        # A signal ends them all at the same safe point.
        console.at_failure(lambda code: code == EXIT_PREEMPTED or processes.leave(code))
    shown = console_progress if processes.is_main() else silent_progress
    progress = shown(after_advance=preemption.stop_here)
    workdir = Path(str(_WORKDIR.value)).expanduser()
    summary = run(_CONFIG.value, workdir, overwrite=_OVERWRITE.value, progress=progress)
    for line in summary.describe():
        progress.note(line)


def _fail_if_exhausted(error: Exception) -> None:
    """Say in one line what to do if memory has run out; measurements lower their own need."""
    from moth_jax.parallel.memory import is_exhausted
    from moth_jax.run.configuration import memory_fields

    if not is_exhausted(error):
        return
    reason = textwrap.shorten(str(error) or "no more of the host", 150)
    fail(
        f"out of memory ({reason}); try another number of mesh.devices, with which the run goes "
        f"on, or, in another --workdir, lower {memory_fields(_CONFIG.value)}"
    )


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the command line; a fault is one line that lists the choices, not a traceback."""
    fault = fault_of_config(argv)
    if fault is not None:
        fail(fault)
    try:
        rest = flags.FLAGS(argv)
    except SystemExit:
        if not any(re.match("--?help", a) for a in argv[1:]):
            raise
        sys.exit(0)  # absl ends with 1
    except Exception as error:  # a configuration file can raise anything
        fail(fault_of_flags(argv, error))
    if not flags.FLAGS["config"].present or not _WORKDIR.value:
        fail("--config=FILE and --workdir=DIR are required; see --help")
    if isinstance(_CONFIG.value, ConfigDict):
        if len(rest) > 1:
            fail(f"unexpected arguments: {' '.join(rest[1:])}; options are --NAME=VALUE")
        return rest
    fail(fault_of_unread(argv, _CONFIG.value))


if __name__ == "__main__":
    preemption.end_until_watched()
    app.run(main, flags_parser=parse_flags)
