"""What only Unix has is not needed to import the package, so that one process trains on a CPU elsewhere too."""

from __future__ import annotations

import subprocess
import sys

# Libraries import these on Unix themselves, so they are refused to peftune's own modules alone.
UNIX_ABSENT = """
import builtins
absent, found = ("fcntl", "resource", "pwd", "grp", "termios"), builtins.__import__
def refuse(name, globals=None, *others, **named):
    if name in absent and (globals or {}).get("__name__", "").startswith("peftune"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return found(name, globals, *others, **named)
builtins.__import__ = refuse
"""
IMPORT_ALL = """
import importlib, pkgutil
import peftune
for name in ("peftune.cli.main", "peftune.training.run"):
    importlib.import_module(name)
optional = {"fastapi", "uvicorn", "starlette", "prometheus_client", "deepspeed", "bitsandbytes"}
for module in pkgutil.walk_packages(peftune.__path__, "peftune."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        assert error.name and error.name.partition(".")[0] in optional, (module.name, error)
"""


def test_every_module_is_imported_without_fcntl_and_resource() -> None:
    done = subprocess.run([sys.executable, "-c", UNIX_ABSENT + IMPORT_ALL], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_peak_memory_without_resource_is_a_number() -> None:
    code = "import torch; from peftune.device import peak_memory\nassert peak_memory(torch.device('cpu')) >= 0"
    done = subprocess.run([sys.executable, "-c", UNIX_ABSENT + code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
