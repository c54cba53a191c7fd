"""Peak resident memory of a verified merge, on a random base of the shape of gpt2-xl (6.2 GB in float32).

    python benchmarks/merge_memory.py [--layers 48] [--width 1600] [--keep DIR]

Writes the base tensor by tensor, merges a rank-16 adapter on all linear layers in a process of its own, and prints
seconds and the peak resident set (Linux: VmHWM, mapped file pages included). Needs about 13 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from peftune.adapters.merge.shards import write_weights
from peftune.model.weights import row_chunks

_MERGE = """
import json, sys, time
from pathlib import Path
start = time.time()
from peftune.adapters.merge.merge import merge
report = merge(Path(sys.argv[1]), Path(sys.argv[2]), base=sys.argv[3], dtype=sys.argv[4])
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps({"peak_MB": int(peak.split()[1]) // 1024, "seconds": round(time.time() - start),
                  "max_abs_logit_difference": report.max_abs_logit_difference, "mean_kl": report.mean_kl,
                  "modules": [report.modules_in_adapter, report.modules_applied]}))
"""


def make_base(directory: Path, config: GPT2Config) -> None:
    """A random checkpoint of this shape, written piece by piece, with a tokenizer of single bytes."""
    config.save_pretrained(directory)
    symbols = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=symbols, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end, bos_token=end).save_pretrained(directory)
    with torch.device("meta"):
        skeleton = GPT2LMHeadModel(config).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.items() if name != "lm_head.weight"}

    def random_rows(name: str) -> list[torch.Tensor]:
        shape = shapes[name]
        if len(shape) == 1:
            return [torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)]
        return [torch.randn(stop - start, *shape[1:]) * 0.02 for start, stop in row_chunks(shape)]

    write_weights(
        directory, shapes, torch.float32, lambda name: iter(random_rows(name)), 5_000_000_000, lambda name: None
    )


LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def make_adapter(directory: Path, config: GPT2Config, rank: int = 16, targets: Sequence[str] = LINEARS) -> None:
    """A random adapter, by default on every linear layer of every block."""
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), fan_in_fan_out=True)
    with torch.device("meta"):
        shapes = get_peft_model_state_dict(
            inject_adapter_in_model(lora, GPT2LMHeadModel(config)), save_embedding_layers=False
        )
    lora.save_pretrained(directory)
    tensors = {f"base_model.model.{name}": torch.randn(tensor.shape) * 0.01 for name, tensor in shapes.items()}
    save_file(tensors, directory / "adapter_model.safetensors")


def make_adapters(root: Path, config: GPT2Config, rank: int, targets: Sequence[str], count: int) -> list[Path]:
    """So many random adapters in directories of their own, made anew."""
    directories = [root / f"adapter-{number}" for number in range(count)]
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        make_adapter(directory, config, rank, targets)
    return directories


def main() -> None:
    """Make base and adapter, merge, print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--width", type=int, default=1600)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()
    config = GPT2Config(n_layer=arguments.layers, n_embd=arguments.width, n_head=arguments.width // 64)
    with tempfile.TemporaryDirectory(dir=arguments.keep) as scratch:
        base, adapter, out = (Path(scratch) / name for name in ("base", "adapter", "merged"))
        base.mkdir()
        start = time.time()
        make_base(base, config)
        make_adapter(adapter, config)
        size = sum(path.stat().st_size for path in base.iterdir())
        print(json.dumps({"base_MB": size // 2**20, "seconds_to_make": round(time.time() - start)}), file=sys.stderr)
        command = [sys.executable, "-c", _MERGE, str(adapter), str(out), str(base), arguments.dtype]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
