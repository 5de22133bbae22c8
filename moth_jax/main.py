"""Measure a classifier's class distances, harden it, measure again, show the result.

    python -m moth_jax.main --config=configs/digits.py --workdir=DIR

Any field of the configuration can be set: --config.harden.epochs=4. The same command again goes on
where an earlier one was interrupted.
"""

import difflib
import re
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from moth_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, such as configs/digits.py.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the results.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Remove the run that is in --workdir first.")

_EXIT_BAD_INPUT = 2


def main(argv: list[str]) -> None:
    """Run the phases; a fault of the input is one line, and exit code 2."""
    from moth_jax import sharding

    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.ERROR)
    sharding.use_all_cores()
    try:
        _run()
    except InputError as error:
        _fail(str(error))
    except OSError as error:
        # A full disk, a missing right: said by the system, and nothing of the run is lost.
        _fail(f"{error.filename or _WORKDIR.value}: {error.strerror or error}")
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on from here", code=130)


def _run() -> None:
    from moth_jax.progress import console_progress
    from moth_jax.run import run

    progress = console_progress()
    workdir = Path(_WORKDIR.value).expanduser()
    summary = run(_CONFIG.value, workdir, overwrite=_OVERWRITE.value, progress=progress)
    for line in describe(summary, workdir):
        progress.note(line)


def describe(summary: dict, workdir: Path) -> list[str]:
    """Return the result in a few lines."""

    def row(name: str, unit: str, before, after, scale: float = 1.0) -> str | None:
        values = [f"{scale * value:.2f}" for value in (before, after) if value is not None]
        return f"{name:16} {' -> '.join(values)} {unit}".rstrip() if values else None

    lines = [
        row("test accuracy", "%", summary["accuracy_before"], summary["accuracy_after"], 100),
        row("class distance", "pixels", summary["distance_before"], summary["distance_after"]),
    ]
    if summary["increase"] is not None:
        lines.append(f"{'increase':16} {100 * summary['increase']:+.2f} %")
    failures = [summary["failures_before"], summary["failures_after"]]
    if any(failures):
        lines.append(f"{'none found in':16} {' -> '.join(map(str, failures))} directions")
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
    if (workdir / "report.html").exists():
        lines.append(f"{'report':16} {workdir / 'report.html'}")
    return [line for line in lines if line is not None]


def _fail(message: str, *, code: int = _EXIT_BAD_INPUT) -> None:
    print(f"moth_jax: {message}", file=sys.stderr)
    sys.exit(code)


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the command line; a fault is one line that lists the choices, not a traceback."""
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        _fail(str(error).splitlines()[0])
    except (AttributeError, KeyError) as error:
        _fail(_unknown_field(argv, error))
    except FileNotFoundError as error:
        _fail(f"there is no configuration file {error.filename}; see the folder configs/")
    except (TypeError, ValueError, SyntaxError, ImportError) as error:
        _fail(f"cannot use the configuration: {str(error).splitlines()[0]}")
    if _CONFIG.value is None or _WORKDIR.value is None:
        _fail("--config=FILE and --workdir=DIR are required; see --help")
    return rest


def _unknown_field(argv: list[str], error: Exception) -> str:
    """Say which field on the command line does not exist, and which come close."""
    from moth_jax.configuration import default_config, field_names

    known = field_names(default_config())
    for argument in argv:
        match = re.match(r"--?(config\.[\w.]+)", argument)
        if match and match.group(1) not in known:
            close = difflib.get_close_matches(match.group(1), known, n=3, cutoff=0.5)
            siblings = [
                n for n in known if n.rpartition(".")[0] == match.group(1).rpartition(".")[0]
            ]
            return (
                f"unknown field {match.group(1)}; did you mean "
                f"{', '.join(close or siblings or known)}?"
            )
    return f"cannot use the configuration: {error}"


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
