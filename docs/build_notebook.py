#!/usr/bin/env python3
"""Run docs/notebooks/first-adapter.ipynb from top to bottom and store its outputs, without anything of this machine.

    python docs/build_notebook.py [OUT.ipynb]

Cells are edited in the notebook itself. Needs nbclient and ipykernel.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent / "notebooks" / "first-adapter.ipynb"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
VARIES = "varies"
"""Tag of a cell whose text is another on another machine: texts that a model writes, messages of a training."""
_PROGRESS = re.compile(r"(?:step|merging|evaluating [\w ]+) \d+ of \d")


def run(notebook: Any) -> Any:
    """The notebook as it comes out of a fresh kernel in an empty directory, with an empty cache and no network."""
    with TemporaryDirectory() as folder:
        environment = os.environ | {"PEFTUNE_CACHE": f"{folder}/cache", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
        environment.pop("MPLBACKEND", None)  # the kernel's own draws into the notebook
        work = Path(folder) / "work"
        work.mkdir()
        client = NotebookClient(notebook, timeout=600, record_timing=False, resources={"metadata": {"path": str(work)}})
        if os.name == "posix":  # no port that others could reach
            kernel = client.create_kernel_manager()
            kernel.transport, kernel.ip = "ipc", f"{folder}/kernel"
        client.execute(env=environment)
        return clean(notebook, folder)


def clean(notebook: Any, folder: str) -> Any:
    """Without what differs from run to run for no reason; an error where an output names a place of this machine.

    What libraries write to stderr is left out, and so is how far a slow machine was; peftune's messages are displayed.
    """
    notebook.metadata = nbformat.from_dict(METADATA)
    count = 0
    for number, cell in enumerate(notebook.cells, 1):
        tags = cell.metadata.get("tags", [])
        cell.id, cell.metadata = f"cell-{number:02}", nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            count += 1
            cell.execution_count, cell.outputs = count, joined(cell.outputs)
            for output in cell.outputs:
                output |= {"execution_count": count} if output.output_type == "execute_result" else {}
    text = nbformat.writes(notebook)
    places = [folder, str(Path.home()), str(Path(__file__).parents[1]), sys.prefix]
    assert not (found := [place for place in places if place in text]), f"an output names {found}"
    return notebook


def joined(outputs: list[Any]) -> list[Any]:
    """Outputs that stay, with messages as plain text and neighbouring parts of a text in one."""
    kept: list[Any] = []
    for output in outputs:
        if output.output_type == "display_data" and output.data.get("text/html", "").startswith("<pre"):
            text = output.data["text/plain"]
            output = nbformat.v4.new_output("stream", name="stdout", text=text)
            if _PROGRESS.match(text):
                continue
        elif output.output_type == "stream" and output.name == "stderr":
            continue
        if kept and output.output_type == kept[-1].output_type == "stream" and output.name == kept[-1].name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def shape(notebook: Any) -> list[Any]:
    """What the outputs of each code cell are; of those that do not vary the text too, without its numbers."""
    return [
        [
            (
                output.output_type,
                output.get("name"),
                sorted(output.get("data", {})),
                "" if VARIES in cell.metadata.get("tags", []) else skeleton(output),
            )
            for output in cell.outputs
        ]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def skeleton(output: Any) -> str:
    """The words of a text or table."""
    text = output.get("text") or output.get("data", {}).get("text/plain", "")
    return " ".join(re.sub(r"-?\d[\d.,]*", "#", text).split())


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else NOTEBOOK
    nbformat.write(run(nbformat.read(NOTEBOOK, as_version=4)), out)
    print(f"written: {out}")
