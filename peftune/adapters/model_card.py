"""The model card (README.md) of an adapter: what every card of peftune's says around a body."""

from __future__ import annotations

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
