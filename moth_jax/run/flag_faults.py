"""What is wrong with a command line, or with the configuration file that it names, in one line."""

import difflib
import os
import re
import traceback
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from moth_jax.errors import InputError


def fault_of_config(argv: list[str]) -> str | None:
    """Say that --config is no file that can be read to its end; None if it is a file or folder."""
    path = _config_path(argv).partition(":")[0]
    if not os.path.exists(path) or os.path.isfile(path) or os.path.isdir(path):
        return None
    return f"cannot use --config: {path} is no regular file, but a pipe, a device or a socket"


def fault_of_flags(argv: list[str], error: Exception) -> str:
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


def fault_of_unread(argv: list[str], value: object) -> str:
    """Say why the value of --config is no configuration."""
    # Where the file could not be read, it is an object with the error.
    error = vars(value).get("_error") if hasattr(value, "__dict__") else None
    return _fault_in_file(argv, error) or _no_such_file(argv)


def _fault_in_file(argv: list[str], error: BaseException | None) -> str | None:
    """Return what the configuration file raised if `error` comes from there, else None."""
    given = _config_path(argv)
    path = Path(given.partition(":")[0]).absolute()  # the rest is the argument of get_config
    while error is not None:
        if isinstance(error, SyntaxError) and _is_path(error.filename, path):
            return f"cannot use --config: {given}, line {error.lineno}: {error.msg}"
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno or 0 for frame in frames if _is_path(frame.filename, path)]
        if lines:
            return _in_words(error, given, lines[-1])
        error = error.__cause__ or error.__context__
    return None


def _is_path(name: str | None, path: Path) -> bool:
    return name is not None and Path(name).absolute() == path


# How a ConfigDict names a field that it does not have, when that is set or read.
_NO_FIELD = re.compile(r'Key "(\w+)" does not exist|^\W*(\w+)\W*(?:$|nDid you mean)')


def _in_words(error: BaseException, path: str, line: int) -> str:
    """Say what was raised in a line of the configuration file."""
    unknown = _NO_FIELD.search(str(error)) if isinstance(error, AttributeError) else None
    if unknown is not None:
        return _unknown_in_file(unknown[1] or unknown[2], path, line)
    kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    return f"cannot use --config: {path}: {kind}{error} (line {line})"


def _unknown_in_file(name: str, path: str, line: int) -> str:
    from moth_jax.run.configuration import default_config, field_names

    parts = {part for field in field_names(default_config(), "") for part in field.split(".")[1:]}
    close = difflib.get_close_matches(name, parts, n=1, cutoff=0.8)
    advice = f"did you mean {close[0]}?" if close else _choices(name, sorted(parts))
    return f"unknown field {name} in {path}, line {line}; {advice}"


def _no_such_file(argv: list[str]) -> str:
    """Say that --config names no configuration file."""
    return (
        f"there is no configuration file {_config_path(argv)!r} with a function "
        "get_config() that returns a ConfigDict; see the folder configs/"
    )


def _unknown_field(argv: list[str], error: Exception) -> str:
    """Say which field of the command line does not exist, and which fields there are."""
    from moth_jax.run.configuration import field_names

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
    """Return the value of --config on the command line, which may not have been parsed."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        given = re.fullmatch(r"--?config(?:=(.*))?", argument)
        if given is not None:
            return following if given[1] is None else given[1]
    return ""


def _choices(wrong: str, fields: list[str]) -> str:
    close = difflib.get_close_matches(wrong, fields, n=1, cutoff=0.8)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}the fields are: {', '.join(fields)}"
