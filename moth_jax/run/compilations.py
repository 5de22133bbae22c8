"""Compiled programs kept on disk, so that the next run starts without waiting for XLA.

A command decides this, not the library: a notebook sets JAX's own options.
"""

import hashlib
import os
import platform
from pathlib import Path

import jax

_CPUINFO = Path("/proc/cpuinfo")


def keep_compilations() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX was told where or not to.

    JAX_COMPILATION_CACHE_DIR names another folder; JAX_ENABLE_COMPILATION_CACHE=false keeps none.
    JAX finds by itself which programs fit (model, budgets, devices, versions).
    """
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(default_folder()))


def default_folder(cpuinfo: Path = _CPUINFO) -> Path:
    """Return ~/.cache/moth_jax/PROCESSOR, or the same below XDG_CACHE_HOME.

    One folder for each kind of processor: where machines share a home, code for instructions that
    one of them lacks would end the process there.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "moth_jax" / f"{platform.machine()}-{_instructions(cpuinfo)}"


def _instructions(cpuinfo: Path) -> str:
    """Return a short name of the processor's instruction set."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    return hashlib.sha256(flags.encode()).hexdigest()[:8]
