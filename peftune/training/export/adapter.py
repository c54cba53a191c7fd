"""The end of a run: the adapter directory with its provenance, picture and model card."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peftune.adapters.directory import write_adapter
from peftune.adapters.provenance import read_provenance
from peftune.errors import CheckFailed
from peftune.model import quantized
from peftune.model.lora import is_dead, stored_adapter
from peftune.training import checkpoint, identity
from peftune.training.distributed import zero
from peftune.training.distributed.collectives import broadcast
from peftune.training.distributed.replicated import Tensors
from peftune.training.export.model_card import model_card
from peftune.training.metrics import read_metrics
from peftune.training.setup import Session
from peftune.version import __version__

_VERSIONS = ("torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers")


@dataclass(frozen=True)
class Delivery:
    """A finished adapter directory: per domain the figures of the base (step 0) and of the adapter."""

    out: Path
    step: int
    metrics: dict[str, dict[str, dict[str, float]]]
    seconds: float

    def summary(self) -> str:
        """One line: where the adapter lies, and per domain the perplexity before and after."""
        changes = [
            f"{domain} perplexity {rows['base']['perplexity']:,.2f} → {rows['adapter']['perplexity']:,.2f}"
            for domain, rows in self.metrics.items()
            if rows.keys() >= {"base", "adapter"}
        ]
        return "; ".join([f"{self.out}: adapter of step {self.step}, {self.seconds:,.0f} s", *changes])


def already_delivered(out: Path, now: dict[str, Any]) -> Delivery | None:
    """What an earlier run of the same recipe left in `out`; UserError where another run's adapter is there."""
    recorded = read_provenance(out)
    if recorded is None or not (out / "adapter_config.json").is_file():
        return None
    identity.refuse_other(recorded.get("identity", {}), now, str(out))
    return Delivery(out, recorded["step"], recorded["metrics"], recorded["seconds"])


def deliver(session: Session) -> Delivery:
    """Write the adapter directory; with early stopping the best step's adapter, else the last one's.

    Raises CheckFailed for an adapter that is still what it was at the start.
    """
    values, _ = session.engine.whole()
    return broadcast(session.accelerator, lambda: _deliver(session, values))


def _deliver(session: Session, values: Tensors) -> Delivery:
    if is_dead(session.adapted, values):
        raise CheckFailed("the adapter did not learn: every B matrix is still zero")
    step = _step_to_deliver(session)
    if step != session.state.step:
        values = checkpoint.read(session.checkpoints / f"step-{step}").values
    config, tensors = stored_adapter(session.adapted, values)
    config["base_model_name_or_path"] = session.recipe.base
    session.records.write(
        "end",
        step=session.state.step,
        delivered_step=step,
        tokens=session.state.tokens,
        seconds=round(session.state.seconds, 1),
    )
    out = Path(session.recipe.run.out)
    events = read_metrics(out / "metrics.jsonl")
    delivery = Delivery(out, step, _before_and_after(events, step), round(session.state.seconds, 1))
    from peftune.training.export.plots import draw_loss  # matplotlib: not before the first step

    provenance = _provenance(session, delivery)
    files: dict[str, bytes | str] = {
        "README.md": model_card(provenance),
        "loss.png": draw_loss(events, _title(session)),
    }
    write_adapter(out, config, tensors, provenance, files)
    return delivery


def _step_to_deliver(session: Session) -> int:
    best = session.state.best_step
    return session.state.step if session.recipe.run.early_stopping is None or best is None else best


def _title(session: Session) -> str:
    recipe = session.recipe
    return f"{Path(recipe.run.out).name}: {recipe.base} with {recipe.lora.variant}, rank {recipe.lora.rank}"


def _before_and_after(events: list[dict[str, Any]], step: int) -> dict[str, dict[str, dict[str, float]]]:
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for event in events:
        if event["event"] == "eval" and event["step"] in (0, step):
            row = "base" if event["step"] == 0 else "adapter"
            numbers = {key: event[key] for key in ("loss", "perplexity", "bits_per_byte", "tokens")}
            figures.setdefault(event["domain"], {})[row] = numbers
    return figures


def _provenance(session: Session, delivery: Delivery) -> dict[str, Any]:
    """What peftune.json holds: enough to know what made this adapter, and to refuse another base."""
    source = session.source
    prints = source.fingerprints
    return {
        "peftune": __version__,
        "base": session.recipe.base,
        "base_fingerprint": prints["base"],
        "tokenizer_fingerprint": prints["tokenizer"],
        "data_fingerprints": {k[5:]: v for k, v in prints.items() if k.startswith("data ")},
        "recipe": session.recipe.model_dump(mode="json"),
        "chat": source.corpus.chat,
        "identity": source.identity,
        "step": delivery.step,
        "tokens": session.state.tokens,
        "seconds": delivery.seconds,
        "precision": session.precision,
        "layout": zero.layout(session.accelerator),
        "trainable_parameters": session.trainable_parameters,
        "metrics": delivery.metrics,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in _VERSIONS}
        | quantized.versions(session.recipe.quantize),
    }
