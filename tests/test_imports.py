"""What imports what: no circles, a core that knows no application, no library before its time."""

import ast
import functools
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import moth_jax

ROOT = Path(moth_jax.__file__).parent
APPLICATION = ("moth_jax.run", "moth_jax.report", "moth_jax.main", "moth_jax.convert")
NEED_TORCH = {
    "moth_jax.models.pytorch.export",
    "moth_jax.models.pytorch.files",
    "moth_jax.models.weights.torch_builders",
}
HEAVY = {
    *("torch", "tensorflow", "tensorflow_datasets", "array_record", "sklearn"),
    *("orbax", "matplotlib", "tensorboardX"),
}
_WITHOUT_TORCH = """
import importlib, json, sys
sys.modules["torch"] = None  # an import of it fails, as where it is not installed
failed = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed[name] = str(error)
print(json.dumps(failed))
"""


@functools.cache
def imports():
    """{module: modules of the package that it imports}, in functions and for types, too."""
    paths = {}
    for path in ROOT.rglob("*.py"):
        parts = ["moth_jax", *path.relative_to(ROOT).with_suffix("").parts]
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: imported(path, paths.keys()) - {name} for name, path in paths.items()}


def imported(path, modules):
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (whole & modules) | ({node.module} if whole - modules else set())
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & modules


def reached(start):
    """All that `start` imports, directly or through others."""
    seen, left = set(), [start]
    while left:
        for name in imports()[left.pop()] - seen:
            seen.add(name)
            left.append(name)
    return seen


def is_application(name):
    return any(name == part or name.startswith(f"{part}.") for part in APPLICATION)


def test_no_module_imports_itself_through_others():
    circles = {name: sorted(reached(name)) for name in imports() if name in reached(name)}
    assert not circles


def test_the_core_imports_nothing_of_the_application():
    # The face of the package imports names for type checkers alone.
    core = [name for name in imports() if not is_application(name)]
    guilty = {name: set(filter(is_application, imports()[name])) for name in core}
    assert {name: names for name, names in guilty.items() if names} == {}


def test_at_most_twelve_modules_lie_flat_at_the_top():
    top = {path.stem for path in ROOT.glob("*.py")}
    assert len(top) <= 12, sorted(top)


def test_every_module_but_those_for_pytorch_files_is_imported_without_torch():
    # pytest skips the doctests of a module that cannot be imported: it must be one of these.
    names = [module.name for module in pkgutil.walk_packages(moth_jax.__path__, "moth_jax.")]
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH, *names],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    failed = json.loads(done.stdout.splitlines()[-1])
    assert failed.keys() == NEED_TORCH
    assert all("torch" in message for message in failed.values())


@pytest.mark.parametrize(
    ("name", "libraries"),
    [
        ("data", HEAVY | {"grain", "PIL"}),
        ("distance.measure", HEAVY),
        ("report", HEAVY | {"PIL"}),
        ("progress", HEAVY | {"PIL"}),
        ("run.metrics", HEAVY | {"PIL"}),
        ("run.console", {"jax"}),  # the command must be able to take a signal before it is loaded
        ("run.preemption", {"jax"}),
    ],
)
def test_importing_a_module_does_not_load_what_only_others_need(name, libraries):
    program = f"import sys, moth_jax.{name}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert not libraries & set(done.stdout.split())
