"""The notebook runs from top to bottom, and what is stored in it is what comes out."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
import pytest

SCRIPT = Path(__file__).parents[1] / "docs" / "build_notebook.py"
NOTEBOOK = SCRIPT.parent / "notebooks" / "first-adapter.ipynb"


@pytest.mark.slow
def test_the_notebook_runs_and_stores_outputs_of_the_shape_that_come_out(tmp_path: Path) -> None:
    """In a process of its own: a kernel's threads and sockets outlive it by a moment."""
    fresh = tmp_path / "fresh.ipynb"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    }
    made = subprocess.run([sys.executable, str(SCRIPT), str(fresh)], env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    shape = runpy.run_path(str(SCRIPT))["shape"]
    stored, now = (shape(nbformat.read(path, as_version=4)) for path in (NOTEBOOK, fresh))
    assert stored == now, "run: python docs/build_notebook.py"
    assert sum(bool(outputs) for outputs in stored) > 10


def test_the_stored_notebook_is_small_whole_and_of_no_machine() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert len(text) < 150_000
    assert [cell.id for cell in notebook.cells] == [f"cell-{n:02}" for n in range(1, len(notebook.cells) + 1)]
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}  # no widgets, no version of Python
    assert all(cell.metadata.keys() <= {"tags"} for cell in notebook.cells)
    assert not re.search(r"/(?:home|root|tmp|Users|usr)/|\bC:\\", text)
    pictures = [o.data for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 1
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


def test_the_shape_knows_words_and_kinds_but_no_numbers() -> None:
    shape = runpy.run_path(str(SCRIPT))["shape"]

    def of(text: str, tags: Sequence[str] = (), name: str = "stdout") -> list[Any]:
        cell = nbformat.v4.new_code_cell(metadata={"tags": list(tags)})
        cell.outputs = [nbformat.v4.new_output("stream", name=name, text=text)]
        return list(shape(nbformat.v4.new_notebook(cells=[cell])))

    assert of("loss  3.25 after 8 steps") == of("loss -13.5 after 1,000 steps") != of("perplexity 3.25 after 8 steps")
    assert of("a text", ["varies"]) == of("another", ["varies"]) != of("another", ["varies"], "stderr")


def test_an_output_that_names_a_place_of_this_machine_is_refused(tmp_path: Path) -> None:
    clean = runpy.run_path(str(SCRIPT))["clean"]
    cell = nbformat.v4.new_code_cell()
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=f"written: {tmp_path}/a")]
    with pytest.raises(AssertionError, match="an output names"):
        clean(nbformat.v4.new_notebook(cells=[cell]), str(tmp_path))


def test_links_of_the_notebook_lead_somewhere() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    prose = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", prose)]
    assert [link for link in links if not (NOTEBOOK.parent / link).exists()] == []
    assert len(links) > 4
