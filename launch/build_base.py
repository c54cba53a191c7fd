#!/usr/bin/env python3
"""Build `builtin:small` from nothing: train its tokenizer and weights on standard-library source.

    python launch/build_base.py --steps 9000 --out peftune/model/small

Stops and resumes at any time (`--work` keeps the state). The rate is constant after the warm-up until the last
quarter of the steps, where it falls to zero, so a run may be continued with more steps until that point.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from peftune.data.packing import Packing, pack
from peftune.data.sources.builtin import TAUGHT, documents, line_hashes

VOCABULARY, LAYERS, WIDTH, HEADS, CONTEXT = 4096, 6, 256, 4, 512
END = "<|endoftext|>"
CARD = """---
license: psf-2.0
library_name: transformers
tags: [gpt2]
---

# builtin:small

A GPT-2 of 6 layers x 256 (4 heads, context 512, byte-level BPE of 4,096 tokens, 5.9M parameters), trained from nothing
by `launch/build_base.py --steps {steps}` as a base to demonstrate adapters on. It writes text that looks like Python
and is not meant for anything else.

**Text.** {training_documents:,} documents of Python {python}'s standard library: top-level definitions and what lies
between them, docstrings and comments included; no tests, no code page tables, nothing of the language reference.
Modules belong to base, adapters or held-out by a hash of their name (`peftune/data/sources/builtin.py`);
`taught_lines.npy` holds hashes of the lines that it was taught, so that no adapter is trained or measured on them.

**Licence.** That of the text: `LICENSE`, as Python {python} carries it.

**Training.** {steps:,} steps of {blocks_per_step} blocks of 512 tokens ({tokens:,} tokens in all), Muon for matrices,
AdamW for the rest, bf16 products over fp32 weights, {seconds:,} seconds on {threads} CPU cores that did other work too.

**Result.** {heldout_nats_per_token} nats per token over every third block of {heldout_documents:,} documents from
modules that it never saw.
"""
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def main() -> None:
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_for(args.work, [d.text for d in documents("code", "base")])
    train = Blocks(tokenizer, "base")
    heldout = Blocks(tokenizer, "heldout")
    print(
        f"{len(train.packing)} blocks of {CONTEXT} to learn from, {len(heldout.packing)} held out",
        flush=True,
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(configuration())
    steps_done, seconds, loss = train_loop(model, train, heldout, args)
    save(
        model,
        tokenizer,
        args.out,
        {
            "steps": steps_done,
            "blocks_per_step": args.batch,
            "tokens": steps_done * args.batch * CONTEXT,
            "training_documents": train.documents,
            "heldout_documents": heldout.documents,
            "heldout_nats_per_token": round(loss, 4),
            "seconds": round(seconds),
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    )
    print(f"held-out loss {loss:.4f} nats per token; written to {args.out}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=9000, help="optimizer steps in all")
    parser.add_argument("--batch", type=int, default=16, help="blocks per step")
    parser.add_argument(
        "--lr", type=float, default=2e-3, help="AdamW's rate for embeddings; matrices use Muon at ten times this"
    )
    parser.add_argument("--work", type=Path, default=Path("build/base"), help="state for resuming")
    parser.add_argument("--out", type=Path, default=Path("build/small"), help="where the checkpoint goes")
    return parser.parse_args()


def configuration() -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="eager",
        bos_token_id=VOCABULARY - 1,
        eos_token_id=VOCABULARY - 1,
    )


def tokenizer_for(work: Path, texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 4,096 entries, GPT-2's own scheme, `<|endoftext|>` last."""
    path = work / "tokenizer.json"
    if not path.exists():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        bpe.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=VOCABULARY - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
            ),
        )
        bpe.add_special_tokens([END])
        bpe.save(str(path))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(path)),
        eos_token=END,
        bos_token=END,
        unk_token=END,
        model_max_length=CONTEXT,
    )


class Blocks:
    """The documents of one part as packed blocks: ids, restarted positions and the document number of each place."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, part: str) -> None:
        texts = [d.text for d in documents("code", part)]  # type: ignore[arg-type]
        end = tokenizer.eos_token_id
        self.documents = len(texts)
        self.examples = [np.array([end, *ids, end]) for ids in tokenizer(texts)["input_ids"]]
        self.packing: Packing = pack(np.array([len(e) for e in self.examples]), CONTEXT)

    def batch(self, blocks: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """ids, positions, labels (-100 where nothing is scored), mask: (B, T) three times and (B, 1, T, T) to add."""
        ids = np.full((len(blocks), CONTEXT), VOCABULARY - 1)
        positions, owner = np.zeros_like(ids), np.full_like(ids, -1)
        labels = np.full_like(ids, -100)
        for row, block in enumerate(blocks):
            at = 0
            for number, span in enumerate(self.packing.spans(block)):
                piece = self.examples[self.packing.example[span]][self.packing.start[span] : self.packing.stop[span]]
                here = slice(at, at + len(piece))
                ids[row, here], positions[row, here], owner[row, here] = piece, np.arange(len(piece)), number
                labels[row, at : at + len(piece) - 1] = piece[1:]
                at += len(piece)
        own = torch.from_numpy(owner)
        seen = (own[:, None, :, None] == own[:, None, None, :]) & torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).tril()
        mask = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, torch.finfo(torch.bfloat16).min)
        return torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(labels), mask


def compiled_loss(model: GPT2LMHeadModel) -> Loss:
    """Summed nats of a batch in bf16; compiled, with softmax fused by the compiler, twice as fast on a CPU."""

    def summed(ids: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.transformer(
                input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False
            ).last_hidden_state
            logits = model.lm_head(hidden.flatten(0, 1))
        return torch.nn.functional.cross_entropy(logits.float(), labels.flatten(), ignore_index=-100, reduction="sum")

    return torch.compile(summed)


@torch.no_grad()
def evaluate(loss: Loss, heldout: Blocks, batch: int) -> float:
    """Nats per token over every third held-out block, whole batches only so that one compiled shape serves."""
    blocks = list(range(0, len(heldout.packing), 3))
    batches = [heldout.batch(blocks[i : i + batch]) for i in range(0, len(blocks) - batch + 1, batch)]
    return sum(float(loss(*b)) for b in batches) / sum(int((b[2] >= 0).sum()) for b in batches)


def rate(step: int, steps: int) -> float:
    """Warm up over 200 steps, hold, fall linearly to zero over the last quarter."""
    return min(1.0, (step + 1) / 200, (steps - step) / (0.25 * steps))


def train_loop(
    model: GPT2LMHeadModel, train: Blocks, heldout: Blocks, args: argparse.Namespace
) -> tuple[int, float, float]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".h." in n)]
    optimizers = [
        torch.optim.Muon(matrices, lr=10 * args.lr, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_rates = [10 * args.lr, args.lr]
    step, seconds, state = 0, 0.0, args.work / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        step, seconds = saved["step"], saved["seconds"]
    loss_of = compiled_loss(model)
    started, running = time.monotonic() - seconds, math.log(VOCABULARY)
    while step < args.steps:
        for optimizer, base in zip(optimizers, base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = base * rate(step, args.steps)
        batch = train.batch(blocks_of(step, args.batch, len(train.packing)))
        loss = loss_of(*batch) / (batch[2] >= 0).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running += 0.05 * (float(loss.detach()) - running)
        step += 1
        if step % 20 == 0:
            elapsed = time.monotonic() - started
            print(f"step {step} loss {running:.3f} {step * args.batch * CONTEXT / elapsed:.0f} tokens/s", flush=True)
        if step % 250 == 0 or step == args.steps:
            print(f"step {step} held out {evaluate(loss_of, heldout, args.batch):.4f}", flush=True)
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizers": [o.state_dict() for o in optimizers],
                    "step": step,
                    "seconds": time.monotonic() - started,
                },
                state.with_suffix(".new"),
            )
            state.with_suffix(".new").rename(state)
    return step, time.monotonic() - started, evaluate(loss_of, heldout, args.batch)


def blocks_of(step: int, batch: int, total: int) -> list[int]:
    """The blocks of one step: every epoch is a fresh permutation, a function of the step alone."""
    wanted = range(step * batch, (step + 1) * batch)
    return [int(np.random.default_rng(i // total).permutation(total)[i % total]) for i in wanted]


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, out: Path, facts: dict[str, object]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(out)
    GenerationConfig(bos_token_id=VOCABULARY - 1, eos_token_id=VOCABULARY - 1).save_pretrained(out)
    tokenizer.save_pretrained(out)
    name_the_tokenizer(tokenizer, out)
    np.save(out / TAUGHT.name, np.unique(np.concatenate([line_hashes(d.text) for d in documents("code", "base")])))
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(CARD.format(**facts), encoding="utf-8")
    shutil.copyfile(Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt", out / "LICENSE")
    (out / "model.safetensors").chmod(0o644)


def name_the_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Store it as what it is, a GPT-2 tokenizer, with vocab.json and merges.txt: every Transformers reads that."""
    tokenizer.backend_tokenizer.model.save(str(out))
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "GPT2Tokenizer"}
    settings.pop("backend", None)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
