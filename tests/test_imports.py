"""What can be imported where: only modules for PyTorch's own files need torch."""

import json
import pkgutil
import subprocess
import sys

import moth_jax

NEED_TORCH = {
    "moth_jax.models.weights.torch_builders",
    "moth_jax.models.pytorch.export",
    "moth_jax.models.pytorch.files",
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
