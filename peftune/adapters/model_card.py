"""The model card (README.md) of an adapter: what every card of peftune's says around a body."""

from __future__ import annotations


def model_card(base: str, out: str, body: str) -> str:
    """Markdown with the front matter that hubs read; `out` is the adapter's directory, `body` tells what it is."""
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
