"""Answers command lines, each in a fork of itself: a fresh process without the imports' seconds.

Reads requests from stdin and writes answers to stdout, a JSON object a line (`runs.CommandServer`).
"""

import glob
import importlib
import itertools
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import orbax.checkpoint
import sklearn.datasets
import tensorboardX
from absl import app
from orbax.checkpoint import v1

from moth_jax import main
from moth_jax.models.weights import importing
from moth_jax.run import preemption, runner

_IMPORTED = (orbax.checkpoint, v1, sklearn.datasets, tensorboardX, runner, importing)
_SECONDS, _HOLD_SECONDS = 300, 60
_NOBODY = 65534


def answer(request: dict) -> dict:
    """Run a command line in a fork, and wait for it."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            _be_the_command(request, out, err)
        status = _wait(child, request)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "stdout": texts[0], "stderr": texts[1]}


def _wait(child: int, request: dict) -> int:
    deadline = time.monotonic() + _SECONDS
    pending = request.get("send")
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if pending and len(glob.glob(request["when"])) >= request.get("count", 1):
            os.kill(child, pending)
            pending = None
        if time.monotonic() > deadline:
            os.kill(child, 9)
        time.sleep(0.002)


def _be_the_command(request: dict, out, err) -> None:
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        if "file_size" in request:
            limit = request["file_size"], resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        if request.get("nobody") and os.geteuid() == 0:
            os.setgroups([])
            os.setuid(_NOBODY)
        # A shell's background jobs ignore Ctrl-C, and their children inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if "hold" in request:
            _hold(**request["hold"])
        sys.argv = ["main.py", *request["arguments"]]
        app.run(main.main, flags_parser=main.parse_flags)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _hold(module: str, owner: str, name: str, call: int, file: str, forever=False) -> None:
    """Let the `call`-th call of a method make `file`, and wait there for a signal (or `forever`).

    However busy the machine is, the signal comes at that moment.
    """
    cls = getattr(importlib.import_module(module), owner)
    method, calls = getattr(cls, name), itertools.count(1)

    def held(*args, **kwargs):
        if next(calls) == call:
            Path(file).touch()
            until = time.monotonic() + _HOLD_SECONDS
            while (forever or not preemption.requested()) and time.monotonic() < until:
                time.sleep(0.01)
        return method(*args, **kwargs)

    setattr(cls, name, held)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=r"os\.fork\(\)")
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
