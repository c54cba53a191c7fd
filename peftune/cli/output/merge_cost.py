"""What a merge costs on a text of the user's: the loss of the base, of base + adapter, and of the merged model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peftune.cli.output.text_output import print_table
from peftune.config.data_section import Source
from peftune.inference.perplexity import evaluate

Figures = Mapping[str, float]


def losses(base: str | None, text: Source, adapter: Path | None = None) -> dict[str, Figures]:
    """Figures on a text, in fp32, of `base` and, where one is given, of the `adapter` on it.

    Raises UserError where either cannot be evaluated, as `evaluate`.
    """
    return {
        name: domains["text"]
        for name, domains in evaluate(base, {"text": text}, {"adapter": adapter} if adapter else None)["rows"].items()
    }


def print_losses(text: str, figures: Mapping[str, Figures]) -> None:
    """Print loss and perplexity by model, each with its distance to base + adapter."""
    rows = []
    for name, of in figures.items():
        against = f"{of['loss'] - figures['adapter']['loss']:+.4f}" if name != "adapter" else ""
        label = "base + adapter" if name == "adapter" else name
        rows.append([label, f"{of['loss']:.4f}", against, f"{of['perplexity']:,.2f}"])
    print_table(f"On {text}", ["model", "nats per token", "against base + adapter", "perplexity"], rows)
