"""A tiny run of the main job, and the command line in fresh processes, for the tests of both."""

import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from moth_jax.distance.matrix import DistanceMatrix
from moth_jax.progress import silent_progress
from moth_jax.run.configuration import make_job
from moth_jax.run.runner import run

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "configs" / "digits.py"

# Every phase of the main job on the digits, with budgets of a few steps.
FIELDS = {
    "training.epochs": 2,
    "training.batch_size": 256,
    "distance.victims": ("0", "1"),
    "distance.num_images": 10,
    "distance.num_steps": 20,
    "distance.directions_per_chunk": 2,
    "harden.max_steps": 12,
    "harden.warmup_steps": 10,
    "harden.warmup_images_per_class": 4,
    "harden.first_steps": 10,
    "harden.next_steps": 5,
    "harden.validate_every": 3,
    "harden.max_accuracy_drop": 1.0,
    "checkpoint_seconds": 0.0,
}
FLAGS = (f"--config={DIGITS}", *(f"--config.{name}={value!r}" for name, value in FIELDS.items()))

_TEMPORARY = tempfile.TemporaryDirectory(prefix="moth_jax_tests_")


def load_config(path=DIGITS):
    """What `get_config()` of a configuration file returns."""
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def tiny_config(**changes):
    """The configuration of `FLAGS`; `changes` name fields with __ for a dot."""
    config = load_config()
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict({**FIELDS, **changes})
    return config


def do(config, workdir, *, overwrite=False):
    """The figures of `run`, without a progress bar and with the compilations of earlier tests."""
    return summary_of(config, workdir, overwrite=overwrite).figures


def summary_of(config, workdir, *, overwrite=False):
    """The `Summary` of the same."""
    with compilations_on_disk():
        return run(config, workdir, overwrite=overwrite, progress=silent_progress())


def job_of(config, dataset, workdir=Path("nowhere"), progress=None):
    """The `Job` of a configuration on a data set, without metrics."""
    return make_job(config, dataset, workdir, progress=progress or silent_progress())


@functools.cache
def finished_run():
    """The folder of the tiny run, done once in one go; not to be changed."""
    workdir = Path(_TEMPORARY.name, "finished")
    do(tiny_config(), workdir)
    return workdir


def figures(workdir):
    """summary.json without the times."""
    summary = json.loads((workdir / "summary.json").read_text())
    return {name: value for name, value in summary.items() if not name.endswith("_seconds")}


def matrices(workdir):
    """The distance matrices before and after."""
    return [DistanceMatrix.load(workdir / f"distance_{when}.npz") for when in ("before", "after")]


def steps(workdir):
    """(phase, step) of each line of metrics.jsonl."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [(record["phase"], record["step"]) for record in map(json.loads, lines)]


def contents(folder):
    """{path: bytes} of all files below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


_CACHE_OPTIONS = {
    "jax_compilation_cache_dir": f"{_TEMPORARY.name}/compilations",
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@contextlib.contextmanager
def compilations_on_disk():
    """Every run traces its own functions; this saves compiling the same programs again."""
    before = {name: getattr(jax.config, name) for name in _CACHE_OPTIONS}
    for name, value in _CACHE_OPTIONS.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


class CommandServer:
    """Runs command lines, each in a process of its own that has everything imported.

    The processes have as many devices as this one and share its compilations, so that their numbers
    are those of `finished_run`.
    """

    def __init__(self):
        options = {name.upper(): str(value) for name, value in _CACHE_OPTIONS.items()}
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "helpers" / "command_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={
                **os.environ,
                **options,
                "PYTHONPATH": str(ROOT),
                "JAX_NUM_CPU_DEVICES": str(jax.device_count()),
            },
        )

    def __call__(self, *arguments, **options):
        """Run `python -m moth_jax.main` with `arguments`.

        Args:
          arguments: of the command line.
          options: `send` a signal when there are `count` files that match the pattern `when`;
            `hold` the command for it at a call of a method (`command_server._hold`);
            `file_size` limits the bytes of a file that is written; `nobody` takes the rights away.

        Returns:
          (exit code, or minus the signal that ended it; stdout; stderr).
        """
        request = {"arguments": list(map(str, arguments)), **options}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        return answer["code"], answer["stdout"], answer["stderr"]

    def close(self):
        self._process.communicate()


@functools.cache
def command_server():
    """The server of this test session; it ends with it."""
    return CommandServer()
