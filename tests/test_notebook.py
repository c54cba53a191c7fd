"""The notebook runs from top to bottom, and what is stored in it is what comes out."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

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


def test_links_of_the_notebook_lead_somewhere() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    prose = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", prose)]
    assert [link for link in links if not (NOTEBOOK.parent / link).exists()] == []
    assert len(links) > 4
