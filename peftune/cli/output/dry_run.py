"""What `train --dry-run` prints: the recipe as it would run, a YAML file that `train` takes, with comments below it.

Of several recipes it prints several documents, `---` between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from peftune.cli.output.text_output import echo
from peftune.config.fleet import read_fleet, refuse_problems
from peftune.console import counted
from peftune.data.batches import Blocks
from peftune.data.sources.read import missing_files
from peftune.errors import UserError
from peftune.training.checkpoint import Checkpoint
from peftune.training.export.adapter import Delivery
from peftune.training.planning.dry_run import DryRun, dry_run
from peftune.training.planning.memory_model import Way

_LAYOUTS = {"one": "1 process", "ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}


def print_dry_run(
    paths: Sequence[Path], overrides: list[str], way: Way = "one", ranks: int = 1, cpu: bool = False
) -> None:
    """Print what a run would do, each adapter of it as a YAML document; UserError names every problem of all.

    Of a single recipe that is valid, what else is wrong is told as the run would tell it, without the file's name.
    """
    members, texts = read_fleet(paths, overrides), []
    if members[1:] and way.startswith("zero"):
        raise UserError("ZeRO shards the state of one adapter; a fleet runs on one process or on ranks with DDP")
    for member in members:
        if member.recipe is None:
            member.problems.extend(missing_files(member.values.get("data")))
            continue
        try:
            texts.append(_text(dry_run(member.recipe, way, ranks, cpu)))
        except UserError as error:
            if not members[1:] and not member.problems:
                raise
            member.problems.append(str(error))
    refuse_problems(members)
    echo("\n---\n".join(texts) + "\n# where adapters learn side by side, the base is held once" * bool(texts[1:]))


def _text(found: DryRun) -> str:
    values = found.recipe.model_dump(mode="json")
    data = values["data"]
    data["train"] = _plain(data["train"])
    if isinstance(data["validation"], dict):
        data["validation"] = {name: _plain(sources) for name, sources in data["validation"].items()}
    elif isinstance(data["validation"], list):
        data["validation"] = _plain(data["validation"])
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120) + "\n".join(_comments(found))


def _plain(sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sources without the settings that they do not have."""
    return [{key: value for key, value in source.items() if value is not None} for source in sources]


def _comments(found: DryRun) -> Iterator[str]:
    recipe, corpus, memory = found.recipe, found.inputs.corpus, found.memory
    yield f"# learns from: {_size(corpus.train)}, {corpus.train.packing.fill():.1%} full"
    for name, blocks in corpus.domains.items():
        yield f"# evaluates on {name}: {_size(blocks)}"
    for finding in corpus.findings:
        yield f"# {finding.line()}"
    steps = f"{found.inputs.total_steps:,} of {recipe.batch.global_size} blocks ({found.inputs.passes:.3g} passes)"
    yield f"# steps: {steps}, {recipe.batch.micro_size} blocks a forward"
    layout = _LAYOUTS[found.way] if found.ranks == 1 else f"{found.ranks} ranks, {_LAYOUTS[found.way]}"
    yield f"# {found.trained:,} trainable parameters, {recipe.run.precision}, {layout}"
    parts = {
        "base": memory.base, "adapter": memory.adapter, "gradient": memory.gradient,
        "optimizer": memory.optimizer_state, "engine": memory.engine,
    }  # fmt: skip
    held = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in parts.items() if size)
    working = memory.working(found.activations) / 1e6
    at_work = f"while it computes about {working:,.0f} more"
    yield f"# memory of a rank in MB: {held}; {at_work}; besides Python and its libraries"
    yield f"# {_outcome(found)}"


def _size(blocks: Blocks) -> str:
    block = blocks.packing.block_size
    return (
        f"{counted(len(blocks.documents), 'document')}, {blocks.tokens():,} scored tokens in "
        f"{counted(len(blocks), 'block')} of {block}"
    )


def _outcome(found: DryRun) -> str:
    out = Path(found.recipe.run.out)
    if isinstance(found.found, Delivery):
        return f"{out}: this recipe was trained already, nothing would be done"
    begins = f"goes on from step {found.found.state.step} in" if isinstance(found.found, Checkpoint) else "writes"
    trackers = f", and to {', '.join(found.recipe.run.track)}" if found.recipe.run.track else ""
    return (
        f"{begins} {out.absolute()}: adapter, peftune.json, README.md, loss.png, metrics.jsonl, checkpoints{trackers}"
    )
