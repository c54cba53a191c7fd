"""What a run delivers: what an earlier start left of it, and what the end of this one writes."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from peftune.adapters.directory import CONFIG, read_adapter, refuse_other_files, write_adapter
from peftune.adapters.model_card import training_card
from peftune.adapters.provenance import INIT, first_row, read_provenance, recorded, recorded_dict, versions_of
from peftune.config.recipe import Recipe
from peftune.console import Console
from peftune.data.documents import sample_of
from peftune.errors import CheckFailed, UserError
from peftune.model import quantized
from peftune.model.lora import Adapted, is_dead, stored_adapter
from peftune.training import checkpoint
from peftune.training.checkpoint import Checkpoint, Figures, State
from peftune.training.health import never_better
from peftune.training.inputs import RunInputs
from peftune.training.metrics import MetricsLog
from peftune.training.optimizer import Tensors
from peftune.training.run_directory import refuse_other_run
from peftune.version import __version__

ROWS = ("base", "adapter")
"""Of the figures of a domain: those of step 0 (`init` in place of `base` where a run began with an adapter), and those
of what is delivered."""
_CARD, _PLOT = "README.md", "loss.png"
_VERSIONS = ("torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers")


@dataclass(frozen=True)
class Delivery:
    """A finished adapter directory."""

    out: Path
    step: int
    """That was delivered: the last, or with early stopping the best."""
    metrics: dict[str, Figures]
    """By domain of the validation text, then `base` (`init`, where a run began with an adapter) and `adapter`: loss in
    nats per token, perplexity, bits per byte, tokens."""
    seconds: float
    """Of all starts together."""

    def summary(self) -> str:
        """One line: where the adapter lies, and per domain the perplexity before and after."""
        changes = [
            f"{domain} perplexity {rows[first_row(rows)]['perplexity']:,.2f} → {rows['adapter']['perplexity']:,.2f}"
            for domain, rows in self.metrics.items()
            if len(rows) == len(ROWS)
        ]
        return "; ".join([f"{self.out}: adapter of step {self.step}, {self.seconds:,.0f} s", *changes])


_DELIVERIES = TypeAdapter(Delivery)


def already_delivered(out: Path, now: dict[str, Any]) -> Delivery | None:
    """What an earlier run of the same recipe left in `out`; UserError where another run's adapter is there."""
    written = read_provenance(out)
    if written is None or not (out / CONFIG).is_file():
        return None
    refuse_other_run(recorded_dict(written, "identity"), now, str(out))
    read_adapter(out)
    try:
        values = {key: written[key] for key in ("step", "metrics", "seconds")} | {"out": str(out)}
        return _DELIVERIES.validate_json(json.dumps(values), strict=True)
    except (KeyError, ValidationError):
        raise UserError(
            f"{out}: peftune.json does not hold what a run writes there; give run.out another name"
        ) from None


def earlier_run(inputs: RunInputs, console: Console) -> Delivery | Checkpoint | None:
    """`left_by_earlier_run`; damaged checkpoints are named and set aside."""
    out, found = Path(inputs.recipe.run.out), left_by_earlier_run(inputs)
    if isinstance(found, Delivery):
        return found
    if found is None and (out / "metrics.jsonl").exists():
        console.say(f"{out}: an earlier run left no checkpoint; starting from step 0")
    checkpoint.tidy(out / "checkpoints", found, console.say)
    return found


def left_by_earlier_run(inputs: RunInputs) -> Delivery | Checkpoint | None:
    """What an earlier run of this recipe left: a finished adapter, a checkpoint to go on from, or nothing.

    UserError where a run of another recipe is there, and where there are checkpoints but none that can be read. Nothing
    is changed.
    """
    out = Path(inputs.recipe.run.out)
    done = already_delivered(out, inputs.identity)
    if done is not None:
        _refuse_if_never(inputs.recipe, out)
        return done
    refuse_other_files(out, (_CARD, _PLOT))
    found = checkpoint.newest(out / "checkpoints")
    if found is not None:
        _refuse_if_never(inputs.recipe, out / "checkpoints")
        refuse_other_run(found.state.identity, inputs.identity, str(out))
        if found.state.step > inputs.total_steps:
            raise UserError(f"{out}/checkpoints: has step {found.state.step} of a run of {inputs.total_steps} steps")
    return found


def _refuse_if_never(recipe: Recipe, where: Path) -> None:
    if recipe.run.resume == "never":
        raise UserError(f"{where}: a run is there, and run.resume is never; use auto, or another run.out")


def deliver(
    inputs: RunInputs, adapted: Adapted, values: Tensors, state: State, metrics: MetricsLog, run_facts: dict[str, Any]
) -> Delivery:
    """Write the adapter directory; with early stopping the best step's adapter, else the last one's.

    `values` are the trained parameters by name, complete and on the CPU; `run_facts` go into peftune.json as they are.
    Raises CheckFailed for an adapter that is still what it was at the start.
    """
    recipe = inputs.recipe
    out = Path(recipe.run.out)
    refuse_other_files(out, (_CARD, _PLOT))  # again: they may have come meanwhile
    if is_dead(adapted, values):
        raise CheckFailed("the adapter did not learn: every B matrix is still zero")
    best = state.best_step if recipe.run.early_stopping is not None else None
    step = state.step if best is None else best
    if step == 0:
        raise CheckFailed(never_better(state, inputs.total_steps))
    if step != state.step:
        try:
            values = checkpoint.read(out / "checkpoints" / f"step-{step}").values
        except UserError as error:
            raise UserError(f"the best adapter is lost: {error}; run.early_stopping=null delivers the last") from None
    config, tensors = stored_adapter(adapted, values)
    seconds = round(state.seconds, 1)
    metrics.write("end", step=state.step, delivered_step=step, tokens=state.tokens, seconds=seconds)
    metrics.flush(state)
    events = metrics.events()
    rows = ROWS if inputs.init is None else (INIT, ROWS[1])
    figures = _before_and_after(state, events, (rows[0], 0), (rows[1], step))
    delivery = Delivery(out, step, figures, seconds)
    if absent := [f"{row} on {d}" for d in inputs.corpus.domains for row in rows if row not in figures.get(d, {})]:
        metrics.lost += f"; peftune.json lacks figures that were lost with the metrics: {', '.join(absent)}"
    from peftune.training.export.plots import draw_loss  # matplotlib: not before the first step

    provenance = _provenance(inputs, state, delivery, run_facts)
    title = f"{out.name}: {recipe.base} with {recipe.lora.variant}, rank {recipe.lora.rank}"
    files: dict[str, bytes | str] = {
        **_tokenizer_files(inputs), _CARD: training_card(provenance), _PLOT: draw_loss(events, title)
    }  # fmt: skip
    write_adapter(out, config, tensors, provenance, files)
    return delivery


def _tokenizer_files(inputs: RunInputs) -> dict[str, bytes]:
    """The tokenizer, where it is not the base's own."""
    if not inputs.recipe.data.new_tokens:
        return {}
    with TemporaryDirectory() as directory:
        inputs.tokenizer.save_pretrained(directory)
        return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def _before_and_after(state: State, events: list[dict[str, Any]], *rows: tuple[str, int]) -> dict[str, Figures]:
    """The figures of these rows, each of a step, by domain; from the metrics where an older release began."""
    figures: dict[str, Figures] = {}
    for row, number in rows:
        logged = {e["domain"]: e for e in events if e["event"] == "eval" and e["step"] == number}
        for domain, measured in (state.figures.get(str(number)) or logged).items():
            numbers = {key: measured[key] for key in ("loss", "perplexity", "bits_per_byte", "tokens")}
            figures.setdefault(domain, {})[row] = numbers
    return figures


def _sample(digests: np.ndarray, inputs: RunInputs) -> str:
    """Of what was learnt here, and before in the adapter that the run goes on from."""
    earlier = recorded(inputs.init.adapter.provenance, "training_documents") if inputs.init else None
    with suppress(ValueError):
        return sample_of(digests, earlier if isinstance(earlier, str) else "")
    return sample_of(digests)


def _provenance(inputs: RunInputs, state: State, delivery: Delivery, run_facts: dict[str, Any]) -> dict[str, Any]:
    """What peftune.json holds: enough to know what made this adapter, and to refuse another base."""
    train = inputs.corpus.train
    return {
        "peftune": __version__,
        **inputs.base.identity(),
        **({"base_merged": inputs.base.merged} if inputs.base.merged else {}),
        **({"init": inputs.init.chain()} if inputs.init else {}),
        "data_fingerprints": inputs.corpus.fingerprints,
        **({"rows_left_out": inputs.corpus.left_out} if inputs.corpus.left_out else {}),
        "training_documents": _sample(train.store.digests[train.documents], inputs),
        **({"validation_also_trained_on": also} if (also := inputs.corpus.also_trained_on) else {}),
        "recipe": inputs.recipe.model_dump(mode="json"),
        "chat": inputs.corpus.chat,
        "chat_template": inputs.recipe.data.chat,
        "identity": inputs.identity,
        "step": delivery.step,
        "tokens": state.tokens,
        "seconds": delivery.seconds,
        **run_facts,
        "metrics": delivery.metrics,
        **({"metrics_begin_at_step": state.records_from} if state.records_from else {}),
        "versions": versions_of(*_VERSIONS) | quantized.versions(inputs.recipe.quantize),
    }
