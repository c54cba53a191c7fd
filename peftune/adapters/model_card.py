"""Model cards (README.md): of an adapter, whatever made it, of one that was trained, and of a merged model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftune.adapters.provenance import INIT, first_row, merged_text, recorded
from peftune.model.base import BUILTIN


def model_card(base: str, out: str, body: str, repository: str = "") -> str:
    """Markdown with the front matter that hubs read; `out` is the adapter's directory, `body` tells what it is.

    `repository` is the hub's, where it is to be downloaded from.
    """
    directory = out.rstrip("/")
    download = f"hf download {repository} --local-dir {out}\n" if repository else ""
    return f"""---
base_model: {base}
library_name: peft
tags: [gpt2, lora, peftune]
---

# {directory.split("/")[-1]}

{body}

## Use

```
{download}peftune generate --base {base} --adapter {out} --prompt "…"
peftune merge {out} --out {directory}-merged
```

It is an ordinary PEFT adapter: `AutoPeftModelForCausalLM.from_pretrained("{out}")` loads it with its base, without
peftune{_WHERE if base in BUILTIN else ""}. Begin every prompt there with the token that begins texts of the
base (GPT-2's `<|endoftext|>`), as in training; peftune does so itself, and so does the tokenizer of the merged model.
"""


_WHERE = """, on the machine where it was made. Elsewhere, give `PeftModel.from_pretrained` the base out of an installed
peftune: `AutoModelForCausalLM.from_pretrained(peftune.model.base.open_base("builtin:small").directory)`"""


def training_card(provenance: Mapping[str, Any]) -> str:
    """The card of an adapter that was trained; `provenance` is its peftune.json."""
    recipe = provenance["recipe"]
    lora, optim = recipe["lora"], recipe["optim"]
    targets = lora["targets"] if isinstance(lora["targets"], str) else ", ".join(lora["targets"])
    sources = ", ".join(f"`{source['path']}`" for source in recipe["data"]["train"])
    also = provenance.get("validation_also_trained_on", {}).items()
    leaked = "".join(f"{count:,} documents of {domain} were trained on too. " for domain, count in also)
    first = provenance.get("metrics_begin_at_step")
    since = f" since step {first} (what was before was lost)" if first else ""
    body = f"""\
A {lora["variant"]} adapter (rank {lora["rank"]}, alpha {lora["alpha"]:g}, targets: {targets}) for `{recipe["base"]}`,
{provenance["trainable_parameters"]:,} trained parameters, trained with peftune {provenance["peftune"]} on {sources}.

{_origins(provenance)}{figures_table(provenance["metrics"])}
{leaked}

Learning: {provenance["step"]} steps of {recipe["batch"]["global_size"]} blocks, {provenance["tokens"]:,} tokens,
peak rate {optim["lr"]:g} ({optim["schedule"]}), {provenance["precision"]}, seed {recipe["run"]["seed"]},
{provenance["seconds"]:,.0f} seconds. `peftune.json` holds the full recipe and the fingerprints of base and data,
`metrics.jsonl` every step{since}.

![Course of the loss](loss.png)"""
    return model_card(recipe["base"], recipe["run"]["out"], body)


def _origins(provenance: Mapping[str, Any]) -> str:
    """Paragraphs on its base, quantised or merged, and on what it began with; empty where there is nothing to say."""
    paragraphs = []
    if kind := provenance["recipe"]["quantize"]:
        paragraphs.append(
            f"The base was quantised to {kind} meanwhile, and the figures below were measured on that; the adapter is\n"
            "one for the full-precision base."
        )
    if merged := provenance.get("base_merged"):
        paragraphs.append(
            f"Its base is {merged_text(merged)}. It is relative to that merged model: load it on that, not on "
            f"`{merged[-1].get('base')}`."
        )
    if chain := provenance.get("init"):
        named = [
            f"`{e['adapter']}` ({str(e['adapter_fingerprint'])[:12]}, step {e.get('step', 'unknown')})" for e in chain
        ]
        paragraphs.append(f"Its training went on from the adapter {', and that from '.join(named)}.")
    return "".join(f"{paragraph}\n\n" for paragraph in paragraphs)


def figures_table(metrics: Mapping[str, Any]) -> str:
    """Held-out figures by domain, before and after training; what a record of another program lacks is said."""
    if not metrics:
        return "It was not evaluated: the recipe has no validation data."
    first = first_row(next(iter(metrics.values())))
    of = "at the start" if first == INIT else first
    rows = [
        f"| domain | scored tokens | perplexity, {of} | with adapter | bits per byte, {of} | with adapter |",
        "|---|---|---|---|---|---|",
    ]
    for domain, figures in metrics.items():
        values = [recorded(figures, row, key) for key in ("perplexity", "bits_per_byte") for row in (first, "adapter")]
        cells = [f"{value:.3f}" if isinstance(value, int | float) else "not measured" for value in values]
        tokens = next((n for row in (first, "adapter") if isinstance(n := recorded(figures, row, "tokens"), int)), 0)
        rows.append(f"| {domain} | {tokens:,} | {' | '.join(cells)} |")
    return "\n".join(rows)


def merged_card(repository: str, base: str | None, begins_texts: bool) -> str:
    """The card of a merged model on the hub; `base` is the hub's name of what it was merged from, if it has one.

    `begins_texts` where its tokenizer puts the begin of text before a text.
    """
    call = (
        "Its tokenizer puts the begin of text (GPT-2's `<|endoftext|>`) before every text, as in training."
        if begins_texts
        else "Begin every prompt with the begin of text (GPT-2's `<|endoftext|>`), as `peftune generate` does."
    )
    named = f"base_model: {base}\n" if base else ""
    merged = f"A LoRA adapter merged into `{base}`" if base else "A GPT-2"
    return f"""---
{named}library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, peftune]
---

# {repository.split("/")[-1]}

{merged}, written by peftune. It is an ordinary checkpoint:
`AutoModelForCausalLM.from_pretrained("{repository}")` loads it. {call}
"""
