"""What a quantised base takes and what it costs: memory of loading one, and how far it is from full precision.

    python benchmarks/quantized.py memory [--layers 12] [--width 768]
    python benchmarks/quantized.py error [--base builtin:small] [--ranks 8 16 64]

`memory` loads a random base of the shape of GPT-2 in a process of its own for each way of holding it, and prints the
bytes held, the largest private memory while loading over that before (Linux: RssAnon, so without the pages of the
mapped checkpoint, which the system takes back) and seconds.
`error` scores the built-in held-out documents with each way of holding a trained base, with and without LoftQ's
correction at its start: loss in nats per token, mean KL of its predictions from those of float32, and seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from merge_memory import make_base
from transformers import GPT2Config

from peftune.config.recipe import LoraSection
from peftune.data.sources.builtin import documents
from peftune.model.base import Base, open_base
from peftune.model.load import load_model
from peftune.model.lora import inject

_LOAD = """
import json, sys, threading, time
from pathlib import Path
from peftune.model.base import Base, open_base
from peftune.model.load import DTYPES, footprint, load_model
from peftune.model.quantized import loading_options

def private():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e6

def watch():
    while not done.wait(0.002):
        seen.append(private())

kind, done = sys.argv[2], threading.Event()
if kind in ("int8", "nf4"):  # import everything first
    loading_options(kind, "cpu")
    import bitsandbytes.nn
from transformers import GPT2LMHeadModel
before, start = private(), time.time()
seen, watcher = [before], threading.Thread(target=watch)
watcher.start()
model = load_model(Base(Path(sys.argv[1])), DTYPES.get(kind, DTYPES["bf16"]), quantize=None if kind in DTYPES else kind)
seconds = round(time.time() - start, 1)
done.set(), watcher.join()
print(json.dumps({"held as": kind, "MB": round(footprint(model.requires_grad_(False)).held / 1e6, 1),
                  "peak_MB": round(max(seen) - before), "seconds": seconds}))
"""


def memory(layers: int, width: int) -> None:
    """One line of JSON for each way of holding a base of this shape; what is not quantised is bf16."""
    with tempfile.TemporaryDirectory() as scratch:
        make_base(Path(scratch), GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64))
        for kind in ("fp32", "bf16", "int8", "nf4"):
            subprocess.run([sys.executable, "-c", _LOAD, scratch, kind], check=True)


@torch.no_grad()
def error(base: str, ranks: list[int]) -> None:
    """One line of JSON for each way of holding a trained base, on the same documents."""
    directory = open_base(base).directory
    tokenizer = Base(directory).tokenizer
    texts = [d.text for part in ("docs/heldout", "code/heldout") for d in documents(*part.split("/"))[:12]]
    rows = [torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])[:, :256] for text in texts]

    def predictions(model: torch.nn.Module) -> list[torch.Tensor]:
        return [model(row).logits[0].log_softmax(dim=1) for row in rows]

    full = predictions(load_model(Base(directory)))
    for kind in (None, "int8", "nf4"):
        for rank in [0] if kind is None else [0, *ranks]:
            start, model = time.time(), load_model(Base(directory), quantize=kind)
            if rank:
                model = inject(
                    model, LoraSection(rank=rank, variant="loftq"), 0, Base(directory).weights.tensor
                ).model.eval()
            seconds, found = time.time() - start, predictions(model)
            nats = [-p[:-1].gather(1, row[0, 1:, None]).sum() for p, row in zip(found, rows, strict=True)]
            kl = [(p.exp() * (p - q)).sum() for p, q in zip(full, found, strict=True)]
            print(json.dumps({
                "held as": kind or "fp32", "loftq rank": rank,
                "loss": round(float(sum(nats)) / sum(row.numel() - 1 for row in rows), 4),
                "kl": float(f"{max(0.0, float(sum(kl))) / sum(row.numel() for row in rows):.2e}"),
                "seconds": round(seconds, 1),
            }))  # fmt: skip


def main() -> None:
    """Choose what to measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "error"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--base", default="builtin:small")
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 16, 64])
    arguments = parser.parse_args()
    if arguments.what == "memory":
        memory(arguments.layers, arguments.width)
    else:
        error(arguments.base, arguments.ranks)


if __name__ == "__main__":
    main()
