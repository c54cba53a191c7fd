"""The shape of the package, as docs and reviewers rely on it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import peftune

PACKAGE = Path(peftune.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# Who stands on which floor; a room imports from floors below its own.
FLOORS = (
    {"errors", "__version__"},
    {"files", "console", "config"},
    {"data", "model"},
    {"adapters"},
    {"inference", "evaluate"},
    {"training"},
    {"serve"},
    {"cli"},
    {"__main__"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms_imported_by(module: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of each import from the package, inside functions too."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "peftune":
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peftune."):
            yield node.lineno, str(node.module).split(".")[1]
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, n.name.split(".")[1]) for n in node.names if n.name.startswith("peftune."))


def test_only_the_server_knows_its_framework() -> None:
    said = {path for word in ("fastapi", "starlette", "uvicorn") for path in modules_that_say(word)}
    assert {path for path in said if not path.startswith("serve/")} == {"cli/serve.py"}  # tells what is not installed


def modules_that_say(word: str) -> set[str]:
    """Modules with the word in code or comment, as paths in the package."""
    return {str(m.relative_to(PACKAGE)) for m in MODULES if word in m.read_text(encoding="utf-8")}


def test_imports_point_down() -> None:
    wrong = []
    for module in MODULES:
        room = room_of(module)
        for line, other in rooms_imported_by(module):
            if room not in ("__init__", other) and FLOOR_OF[other] >= FLOOR_OF[room]:
                wrong.append(f"{module.relative_to(PACKAGE)}:{line} imports {other}")
    assert wrong == []


def test_every_module_stands_on_a_floor() -> None:
    assert {room_of(module) for module in MODULES} - {"__init__"} <= FLOOR_OF.keys()


@pytest.mark.parametrize(
    ("word", "where"),
    [
        ("bitsandbytes", {"model/quantized.py"}),
        ("deepspeed", {"training/distributed/zero.py", "cli/launcher/configuration.py"}),  # the second names its file
        ("Conv1D", {"model/lora.py", "adapters/merge/verify.py", "adapters/fold.py", "adapters/layout.py"}),
    ],
)
def test_one_place_knows_a_library(word: str, where: set[str]) -> None:
    assert modules_that_say(word) <= where


def test_modules_stay_short() -> None:
    lengths = {str(m.relative_to(PACKAGE)): len(m.read_text(encoding="utf-8").splitlines()) for m in MODULES}
    assert {name: length for name, length in lengths.items() if length >= 300} == {}


def test_no_module_is_a_drawer() -> None:
    drawers = {"utils", "util", "common", "helpers", "helper", "misc", "manager", "base_classes"}
    assert [m.name for m in MODULES if m.stem in drawers] == []


def test_every_module_says_what_it_is_for() -> None:
    silent = [m for m in MODULES if m.stat().st_size and not ast.get_docstring(ast.parse(m.read_text("utf-8")))]
    assert silent == []


def test_the_command_line_is_imported_without_anything_heavy() -> None:
    heavy = "torch", "transformers", "peft", "datasets", "numpy", "pandas", "matplotlib", "pydantic"
    code = f"import sys, peftune.cli.main; print([name for name in {heavy} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
