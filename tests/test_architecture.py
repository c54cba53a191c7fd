"""The shape of the package, as docs and reviewers rely on it: layers, folders, names, and who may say what."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import peftune

PACKAGE = Path(peftune.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# Lowest first; a package imports from layers below its own.
LAYERS = (
    {"version", "errors"},
    {"files", "cache", "console", "config", "device"},
    {"data", "model"},
    {"adapters"},
    {"inference"},
    {"training"},
    {"serve"},
    {"cli"},
    {"__main__", "__init__"},
)
LAYER_OF = {package: layer for layer, packages in enumerate(LAYERS) for package in packages}


def name_of(module: Path) -> str:
    """A path in the package, without `.py`: `model/base`."""
    return str(module.relative_to(PACKAGE).with_suffix(""))


def package_of(module: Path) -> str:
    return name_of(module).split("/")[0]


def imported_by(module: Path) -> Iterator[tuple[int, str]]:
    """(line, module as `name_of` has it) of each import from the package: inside functions and TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "peftune":
            folder = "/".join(str(node.module).split(".")[1:])
            for name in node.names:
                inside = f"{folder}/{name.name}".strip("/")
                yield node.lineno, inside if (PACKAGE / f"{inside}.py").exists() else folder or "__init__"
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, "/".join(n.name.split(".")[1:]) or "__init__")
                        for n in node.names if n.name.partition(".")[0] == "peftune")  # fmt: skip


def test_imports_point_down() -> None:
    wrong = []
    for module in MODULES:
        package = package_of(module)
        for line, other in imported_by(module):
            if package != other.split("/")[0] and LAYER_OF[other.split("/")[0]] >= LAYER_OF[package]:
                wrong.append(f"{name_of(module)}:{line} imports {other}")
    assert wrong == []


def test_every_module_stands_in_a_layer() -> None:
    assert {package_of(module) for module in MODULES} <= LAYER_OF.keys()


def test_no_files_import_each_other_in_a_circle() -> None:
    """Through any number of files, imports inside functions and for type checkers included."""
    below = {name_of(module): {other for _, other in imported_by(module)} for module in MODULES}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"circle: {' → '.join([*way[way.index(module) :], module])}"
        if module not in done:
            for other in below.get(module, ()):
                visit(other, (*way, module))
            done.add(module)

    for module in below:
        visit(module, ())


def modules_that_say(word: str) -> set[str]:
    """Modules with the word in code or comment, as paths in the package."""
    return {str(m.relative_to(PACKAGE)) for m in MODULES if word in m.read_text(encoding="utf-8")}


@pytest.mark.parametrize(
    ("word", "where"),
    [
        ("bitsandbytes", {"model/quantized.py"}),
        (
            "deepspeed",
            {"training/distributed/zero.py", "training/distributed/start.py", "cli/launcher/configuration.py"},
        ),  # the second names its file
        ("Conv1D", {"model/lora.py", "adapters/merge/verify.py", "adapters/fold.py", "adapters/layout.py"}),
    ],
)
def test_one_place_knows_a_library(word: str, where: set[str]) -> None:
    assert modules_that_say(word) <= where


def test_only_the_server_knows_its_framework() -> None:
    said = {path for word in ("prometheus_client", "starlette", "uvicorn") for path in modules_that_say(word)}
    assert {path for path in said if not path.startswith("serve/")} <= {"cli/serve.py"}  # tells what is not installed


def test_only_the_command_line_prints() -> None:
    """Library code speaks through `console.Console` (messages and progress on stderr) and logging."""
    prints = re.compile(r"^\s*(?:from|import) rich\b|\bprint\(|\btyper\.echo\(|\bsys\.stdout\b", re.MULTILINE)
    found = [name_of(m) for m in MODULES if package_of(m) != "cli" and prints.search(m.read_text(encoding="utf-8"))]
    # The watchdog ends the process at once, from a thread, in the middle of anything.
    assert set(found) <= {"console", "training/distributed/watchdog"}


def test_library_code_names_no_command_line_flag() -> None:
    """Errors and docstrings make sense in Python too; `peftune/cli` says how a flag is spelt."""
    flag = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
    found = []
    for module in MODULES:
        if package_of(module) != "cli" and name_of(module) != "adapters/model_card":  # a page that shows commands
            tree = ast.parse(module.read_text(encoding="utf-8"))
            texts = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            found += [f"{name_of(module)}:{n.lineno} {hit}" for n in texts for hit in flag.findall(str(n.value))]
    assert found == []


def test_folders_and_modules_stay_small() -> None:
    files: dict[Path, int] = defaultdict(int)
    for module in MODULES:
        files[module.parent] += module.name != "__init__.py"
    assert {str(folder): count for folder, count in files.items() if count > 12} == {}
    lengths = {name_of(m): len(m.read_text(encoding="utf-8").splitlines()) for m in MODULES}
    assert {name: length for name, length in lengths.items() if length >= 300} == {}


SAME_IDEA = {  # GPT-2's parts, once for training and once for decoding
    "Block", "Norm",
}  # fmt: skip


def test_public_classes_have_names_of_their_own() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for module in MODULES:
        for node in ast.parse(module.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(name_of(module))
    assert {name: where for name, where in homes.items() if len(where) > 1 and name not in SAME_IDEA} == {}


SAME_STEM = {"forward"}  # GPT-2's forward: for training, for decoding


def test_modules_of_a_package_have_names_of_their_own() -> None:
    homes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module in MODULES:
        if module.stem != "__init__":
            homes[package_of(module), module.stem].append(name_of(module))
    assert [where for (_, stem), where in homes.items() if len(where) > 1 and stem not in SAME_STEM] == []


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
