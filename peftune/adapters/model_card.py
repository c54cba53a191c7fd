"""The model card of an adapter: front matter for hubs, what it is, how to use it."""

from __future__ import annotations


def model_card(base: str, out: str, body: str) -> str:
    """Markdown of the README.md in the adapter directory `out`; `body` says how the adapter was made."""
    directory = out.rstrip("/")
    return f"""---
base_model: {base}
library_name: peft
tags: [gpt2, lora, peftune]
---

# {directory.split("/")[-1]}

{body}

## Use

```
peftune generate --base {base} --adapter {out} --prompt "…"
peftune merge {out} --out {directory}-merged
```

It is an ordinary PEFT adapter: `PeftModel.from_pretrained(base, "{out}")` loads it without peftune.
"""
