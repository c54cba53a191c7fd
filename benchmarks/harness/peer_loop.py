"""A peer as a contestant: the same base, documents and adapter, timed inside its own loop of optimizer steps."""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from collections import deque
from contextlib import redirect_stdout
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainerCallback
from transformers.training_args import TrainingArguments

from benchmarks.harness.memory import Clock
from benchmarks.harness.options import Peer
from benchmarks.harness.workers import Channel


def worker(job: dict[str, Any], channel: Channel) -> None:
    """Rounds of full steps until `tokens` real tokens; the value is real tokens per second."""
    peer = Peer(**job["peer"])
    options: dict[str, Any] = {"attn_implementation": peer.attention} if peer.attention else {}
    if peer.dropout is not None:
        options |= {f"{kind}_pdrop": peer.dropout for kind in ("resid", "embd", "attn")}
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=job["rank"], lora_alpha=2 * job["rank"], lora_dropout=0.0, fan_in_fan_out=True,
        target_modules=job["targets"],
    )  # fmt: skip
    clock = Clock(channel, job["tokens"], job["device"])
    with redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as scratch:
        base = AutoModelForCausalLM.from_pretrained(job["base"], dtype=getattr(torch, peer.weights), **options)
        tokenizer = AutoTokenizer.from_pretrained(job["base"])
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        if peer.trainer == "loop":
            run_loop(peer, job, clock, get_peft_model(base, lora), examples(job, tokenizer), collator)
            return
        own = {
            "output_dir": scratch, "max_steps": 1_000_000, "save_strategy": "no", "report_to": [],
            "disable_tqdm": True, "use_cpu": job["device"] == "cpu", "seed": job["seed"], **peer.arguments,
        }  # fmt: skip
        if peer.trainer == "trainer":
            data = Dataset.from_list(examples(job, tokenizer))
            arguments = TrainingArguments(**own)
            trainer = Trainer(get_peft_model(base, lora), arguments, collator, train_dataset=data)
        else:
            trl: Any = importlib.import_module("trl")  # loads its names late, which a type checker cannot follow
            data = load_dataset("json", data_files=job["documents"], cache_dir=scratch, split="train")
            arguments = trl.SFTConfig(**own)
            trainer = trl.SFTTrainer(base, arguments, train_dataset=data, processing_class=tokenizer, peft_config=lora)
        run_trainer(trainer, peer, clock)


def examples(job: dict[str, Any], tokenizer: Any) -> list[dict[str, list[int]]]:
    """Token ids of each document with `<|endoftext|>` at its end; padding is that as well."""
    tokenizer.pad_token = tokenizer.eos_token
    rows = map(json.loads, Path(job["documents"]).read_text(encoding="utf-8").splitlines())
    return [dict(tokenizer(row["text"] + tokenizer.eos_token)) for row in rows]


class Timing(TrainerCallback):
    """The clock in a Trainer's own loop."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = not self.clock.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = not self.clock.stepped()


def real_tokens(batch: dict[str, Any]) -> int:
    """Tokens of a batch that are not padding."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    documents = batch["cu_seq_lens_q"].diff() > 1  # TRL's packed batches; each masks its first label
    return int((batch["labels"] != -100).sum()) + int(documents.sum())


def run_trainer(trainer: Any, peer: Peer, clock: Clock) -> None:
    """Count the tokens of every batch that a Trainer learns from, and let the callback end its rounds."""
    step, collate = trainer.training_step, trainer.data_collator
    counts: deque[int] = deque()  # counted before batches move to a GPU, where asking would make the host wait

    def collated(examples: Any) -> Any:
        batch = collate(examples)
        counts.append(real_tokens(batch))
        return batch

    def counted(model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        clock.tokens += counts.popleft() if counts else real_tokens(inputs)  # empty where workers collate
        return step(model, inputs, *rest, **named)

    trainer.training_step, trainer.data_collator = counted, collated
    trainer.add_callback(Timing(clock))
    _ready(clock, peer, trainer.args.per_device_train_batch_size)
    trainer.train()


def _ready(clock: Clock, peer: Peer, batch: int) -> None:
    clock.channel.send(settings={**peer.settings(), "batch": batch, "threads": torch.get_num_threads()})


def run_loop(peer: Peer, job: dict[str, Any], clock: Clock, model: Any, rows: list[Any], collator: Any) -> None:
    """The leanest loop around PEFT: padded batches, AdamW, nothing else."""
    model.to(job["device"]).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    size = peer.arguments.get("per_device_train_batch_size", job["batch"])
    _ready(clock, peer, size)
    batches = chain.from_iterable(repeat(DataLoader(rows, size, collate_fn=collator, drop_last=True)))
    going = clock.begin()
    while going:
        batch = next(batches)
        tokens = real_tokens(batch)
        if tokens == batch["input_ids"].numel():
            del batch["attention_mask"]
        with torch.autocast(job["device"], torch.bfloat16, enabled=peer.weights == "bfloat16"):
            loss = model(**batch.to(job["device"]), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.tokens += tokens
        going = clock.stepped()
