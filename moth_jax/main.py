"""Measure a classifier's class distances, harden it, measure again, show the result.

    python -m moth_jax.main --config=configs/digits.py --workdir=DIR

Any field of the configuration can be set: --config.harden.epochs=4. The same command again goes on
where an earlier one was interrupted. On SIGTERM or SIGUSR1 it saves and ends with exit code 75.
"""

import difflib
import re
import sys
import textwrap
import traceback
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from moth_jax import preemption
from moth_jax.console import EXIT_INTERRUPTED, EXIT_PREEMPTED, fail, prepare_console
from moth_jax.errors import InputError

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

_WHEN = ("before", "after")
# What the memory of a step grows with, of whichever methods have it.
_MEMORY_FIELDS = ("batch_size", "victims_per_class", "warmup_max_images", "num_images")


def main(argv: list[str]) -> None:
    """Run the phases; a fault of the input is one line, and exit code 2."""
    del argv  # parse_flags has seen to it
    prepare_console()
    try:
        with preemption.watch(grace_seconds=_GRACE.value):
            _run()
    except InputError as error:
        fail(str(error))
    except OSError as error:
        # A full disk, a missing right: said by the system, and nothing of the run is lost.
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
    from moth_jax import distributed, sharding
    from moth_jax.compilations import keep_compilations
    from moth_jax.progress import console_progress, silent_progress
    from moth_jax.run import run

    sharding.use_all_cores()
    keep_compilations()
    distributed.initialise(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    progress = console_progress() if distributed.is_writer() else silent_progress()
    workdir = Path(_WORKDIR.value).expanduser()
    summary = run(_CONFIG.value, workdir, overwrite=_OVERWRITE.value, progress=progress)
    for line in describe(summary, workdir):
        progress.note(line)


def _fail_if_exhausted(error: Exception) -> None:
    """Say in one line what to do where memory has run out; measurements see to it themselves."""
    from moth_jax.configuration import node_of
    from moth_jax.memory import is_exhausted

    if not is_exhausted(error):
        return
    part = node_of(_CONFIG.value.method)
    fields = [f"{part}.{name}" for name in _MEMORY_FIELDS if name in _CONFIG.value[part]]
    reason = textwrap.shorten(str(error) or "no more of the host", 150)
    fail(
        f"out of memory ({reason}); try another number of mesh.devices, with which the run goes "
        f"on, or, in another --workdir, lower training.batch_size or {', '.join(fields)}"
    )


def describe(summary: dict, workdir: Path) -> list[str]:
    """Return the result in a few lines."""

    def row(name: str, unit: str, before, after, show: str = "{:.2f}") -> str | None:
        values = [value for value in (before, after) if value is not None]
        shown = ["none found" if value != value else show.format(value) for value in values]
        if all(value != value for value in values):  # NaN, the mean of nothing, has no unit
            unit = ""
        return f"{name:16} {' -> '.join(shown)} {unit}".rstrip() if values else None

    def of_part(part: str) -> list[float | None]:
        return [_percent(summary.get(f"accuracy_{part}_{when}")) for when in _WHEN]

    def of_attack(part: str) -> list[float | None]:
        return [_percent(summary.get(f"attack_success{part}_{when}")) for when in _WHEN]

    before, after = summary["failures_before"], summary["failures_after"]
    lines = [
        row("test accuracy", "%", *(_percent(summary[f"accuracy_{w}"]) for w in _WHEN)),
        row("- chosen classes", "%", *of_part("chosen")),
        row("- other classes", "%", *of_part("others")),
        row("robustness", "%", *(_percent(summary.get(f"robustness_{w}")) for w in _WHEN)),
        row("attack success", "%", *of_attack("")),
        row("- other classes", "%", *of_attack("_others")),
        row("class distance", "pixels", *(summary[f"distance_{w}"] for w in _WHEN)),
        row(
            "- 95 % interval",
            "pixels",
            *(_interval(summary, f"distance_interval_{w}") for w in _WHEN),
            "{}",
        ),
        _chosen(summary),
        _increase(summary["increase"]),
        row("- 95 % interval", "%", None, _interval(summary, "increase_interval", 100), "{}"),
        row("none found in", "directions", before, after, "{}") if before or after else None,
    ]
    if summary["harden_stopped"] == "accuracy":
        lines.append(
            f"{'stopped early':16} validation accuracy fell by more than the bound; the model is "
            f"the one of step {summary['harden_steps']}"
            + (
                ""
                if summary["harden_steps"]
                else ", so it is unchanged: lower harden.learning_rate"
            )
        )
    if "scan" in summary:
        verdict, cost = summary["scan"]["text"].splitlines()
        lines += [f"{'scan':16} {verdict}", f"{'':16} {cost}"]
    if (workdir / "report.html").exists():
        lines.append(f"{'report':16} {workdir / 'report.html'}")
    return [line for line in lines if line is not None]


def _increase(share: float | None) -> str | None:
    if share is None:
        return None
    shown = "unknown: none found in the same direction before and after"
    return f"{'increase':16} {shown if share != share else f'{100 * share:+.2f} %'}"


def _interval(summary: dict, name: str, unit: float = 1) -> str | None:
    ends = summary.get(name)
    return None if ends is None else " to ".join(f"{unit * end:.2f}" for end in ends)


def _chosen(summary: dict) -> str | None:
    """Return which directions were measured, unless all were."""
    chosen = summary.get("directions")
    is_whole = not chosen or re.fullmatch(r"all [\d,]+ directions", chosen)
    return None if is_whole else f"{'- mean of':16} {chosen}"


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the command line; a fault is one line that lists the choices, not a traceback."""
    try:
        rest = flags.FLAGS(argv)
    except SystemExit:
        if not any(re.match("--?help", a) for a in argv[1:]):
            raise
        sys.exit(0)  # absl ends with 1
    except Exception as error:  # a configuration file can raise anything
        fail(_fault_of_flags(argv, error))
    if not flags.FLAGS["config"].present or not _WORKDIR.value:
        fail("--config=FILE and --workdir=DIR are required; see --help")
    if isinstance(_CONFIG.value, ConfigDict):
        if len(rest) > 1:
            fail(f"unexpected arguments: {' '.join(rest[1:])}; options are --NAME=VALUE")
        return rest
    # Where the file could not be read, the flag holds an object with the error.
    unread = vars(_CONFIG.value).get("_error") if hasattr(_CONFIG.value, "__dict__") else None
    fail(_fault_in_file(argv, unread) or _no_such_file(argv))


def _fault_of_flags(argv: list[str], error: Exception) -> str:
    """Say what is wrong with the command line, or with the configuration file that it names."""
    fault = _fault_in_file(argv, error)
    if fault is not None:
        return fault
    if isinstance(error, OSError) or "no attribute 'get_config'" in str(error):
        return _no_such_file(argv)
    if isinstance(error, (AttributeError, LookupError)):
        return _unknown_field(argv, error)
    if isinstance(error, (flags.Error, TypeError, ValueError)):
        return str(error).strip().splitlines()[0]
    return f"cannot use --config: {_config_path(argv)}: {type(error).__name__}: {error}"


def _fault_in_file(argv: list[str], error: BaseException | None) -> str | None:
    """Return what the configuration file raised, if that is behind `error`."""
    given = _config_path(argv)
    path = Path(given.partition(":")[0]).absolute()  # the rest is the argument of get_config
    while error is not None:
        if isinstance(error, SyntaxError) and _is_path(error.filename, path):
            return f"cannot use --config: {given}, line {error.lineno}: {error.msg}"
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if _is_path(frame.filename, path)]
        if lines:
            return _in_words(error, given, lines[-1])
        error = error.__cause__ or error.__context__
    return None


def _is_path(name: str | None, path: Path) -> bool:
    return name is not None and Path(name).absolute() == path


# What a ConfigDict says of a field that it does not have, set or read.
_NO_FIELD = re.compile(r'Key "(\w+)" does not exist|^\W*(\w+)\W*(?:$|nDid you mean)')


def _in_words(error: BaseException, path: str, line: int) -> str:
    """Say what was raised in a line of the configuration file."""
    unknown = _NO_FIELD.search(str(error)) if isinstance(error, AttributeError) else None
    if unknown is not None:
        return _unknown_in_file(unknown[1] or unknown[2], path, line)
    kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    return f"cannot use --config: {path}: {kind}{error} (line {line})"


def _unknown_in_file(name: str, path: str, line: int) -> str:
    from moth_jax.configuration import default_config, field_names

    parts = {part for field in field_names(default_config(), "") for part in field.split(".")[1:]}
    close = difflib.get_close_matches(name, parts, n=1, cutoff=0.8)
    advice = f"did you mean {close[0]}?" if close else _choices(name, sorted(parts))
    return f"unknown field {name} in {path}, line {line}; {advice}"


def _no_such_file(argv: list[str]) -> str:
    return (
        f"there is no configuration file {_config_path(argv)!r} with a function "
        "get_config() that returns a ConfigDict; see the folder configs/"
    )


def _unknown_field(argv: list[str], error: Exception) -> str:
    """Say which field of the command line does not exist, and which there are in its place."""
    from moth_jax.configuration import field_names

    given = [match[1] for a in argv if (match := re.match(r"--?(config\.[^=]+)", a))]
    path = _config_path(argv)
    if not (given and path):
        return f"cannot use --config: {str(error).splitlines()[0]}"
    config = flags.FLAGS["config"].parser.parse(path)
    if not isinstance(config, ConfigDict):
        return _no_such_file(argv)
    fields = field_names(config)
    wrong = next((name for name in given if name not in fields), given[0])
    section, field = wrong.rpartition(".")[::2]
    if section in fields:  # config.harden.epochs.x
        section = section.rpartition(".")[0]
    siblings = [name for name in fields if name.rpartition(".")[0] == section]
    if siblings:
        return f"unknown field {wrong}; {_choices(wrong, siblings)}"
    sections = {name.rpartition(".")[0] for name in fields} - {"config"}
    close = difflib.get_close_matches(section, sections, n=1, cutoff=0.8)
    meant = [name for section in close for name in (f"{section}.{field}", section)]
    meant = next((name for name in meant if name in {*fields, *sections}), None)
    hint = f"did you mean {meant}? " if meant else ""
    largest = sorted(name for name in sections if name.count(".") == 1)
    return f"unknown field {wrong}; {hint}the sections are: {', '.join(largest)}"


def _config_path(argv: list[str]) -> str:
    """Return what --config is on the command line, as it may not have been parsed."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        given = re.fullmatch(r"--?config(?:=(.*))?", argument)
        if given is not None:
            return following if given[1] is None else given[1]
    return ""


def _choices(wrong: str, fields: list[str]) -> str:
    close = difflib.get_close_matches(wrong, fields, n=1, cutoff=0.8)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}the fields are: {', '.join(fields)}"


if __name__ == "__main__":
    preemption.end_until_watched()
    app.run(main, flags_parser=parse_flags)
