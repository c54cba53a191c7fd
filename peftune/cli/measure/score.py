"""`peftune score`: generated texts against references, with the metrics that papers report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftune.cli.options import Columns, Json, columns_of, named, save_json, source_of
from peftune.errors import UserError


def score(
    hypotheses: Annotated[
        list[str], typer.Argument(metavar="[NAME=]FILE...", help="Texts: one a line, or .jsonl from `generate --out`.")
    ],
    references: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Test set, or text with blank lines between items. Default: in FILE."),
    ] = None,
    column: Columns = None,
    meteor: Annotated[bool, typer.Option("--meteor", help="METEOR too; needs Java.")] = False,
    json_path: Json = None,
) -> None:
    """Score generated texts: BLEU, NIST, ROUGE-L and CIDEr as the E2E challenge computes them, with intervals.

    Example:  peftune score before=base.jsonl after=e2e.jsonl --meteor
    """
    from peftune.cli.output.evaluate import print_scores
    from peftune.data.references import read_hypotheses, read_references
    from peftune.inference.evaluation.text_metrics import score_texts

    files = {name: Path(path) for name, path in named("FILE", hypotheses).items()}
    read = {name: read_hypotheses(path) for name, path in files.items()}
    if column and references is None:
        raise UserError("--column names columns of --references; give it")
    items = None if references is None else read_references(source_of(references, columns_of(column)))
    items = items or next((items for _, items in read.values() if items), None)
    if items is None:
        raise UserError(f"{next(iter(files.values()))}: holds no references; give --references with the test set")
    wanted = references or next(str(files[name]) for name, (_, items) in read.items() if items)
    for name, (texts, own) in read.items():
        if len(texts) != len(items):
            found = f"{len(texts):,} texts, and {wanted} has {len(items):,} items"
            raise UserError(f"{files[name]}: {found}; expected one text for each, in this order")
        for number, (mine, theirs) in enumerate(zip(own or [], items, strict=False), 1):
            if None not in (mine.prompt, theirs.prompt) and mine.prompt != theirs.prompt:
                raise UserError(
                    f"{files[name]}: prompt {number} is {str(mine.prompt)[:60]!r}, in {wanted} it is "
                    f"{str(theirs.prompt)[:60]!r}; expected the same prompts in this order"
                )
    systems = {name: texts for name, (texts, _) in read.items()}
    scores = score_texts(systems, [item.references for item in items], meteor)
    print_scores(scores)
    save_json(json_path, scores)
