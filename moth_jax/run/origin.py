"""Where a result comes from: the command, the commit of the code, the day, the processor."""

import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def origin() -> dict:
    """Return where a result comes from: its command, the code's commit, the day, the processor."""
    return {
        "command": command(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
    }


def commit() -> str:
    """Return the commit of the code, with a + where files differ from it, or are not in it."""
    git = ["git", "-C", str(_ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    code = ("moth_jax", "experiments/*/*.py")  # results come and go
    changed = subprocess.run([*git, "status", "--porcelain", "--", *code], capture_output=True)
    return head.stdout.strip() + ("+" if changed.stdout else "")


def command() -> str:
    """Return the command that is running; DIR stands for a folder or file of the machine."""
    # Names of rows have slashes, too ("w/o scheduler"), but spaces as well.
    given = [f"{a.partition('=')[0]}=DIR" if "/" in a and " " not in a else a for a in sys.argv[1:]]
    script = Path(sys.argv[0]).resolve()
    if script.is_relative_to(_ROOT):
        script = script.relative_to(_ROOT)
    return shlex.join(["python", str(script), *given])


def processor() -> str:
    """Return the name of the processor (Linux), or else its kind."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
