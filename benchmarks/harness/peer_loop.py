"""A peer as a contestant: the same base, documents and adapter, timed inside its own loop of optimizer steps."""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from benchmarks.harness.memory import MemoryGrowth
from benchmarks.harness.peers import Peer
from benchmarks.harness.workers import Channel


class Clock:
    """Ends a round once its tokens are done, and sleeps until the next; False from `stepped` at the end."""

    def __init__(self, channel: Channel, job: dict[str, Any]) -> None:
        self.channel, self.wanted = channel, job["tokens"]
        self.growth = MemoryGrowth(job["device"])
        self.tokens = self.steps = 0

    def begin(self) -> bool:
        """Sleep until a round is asked for, then start the clock."""
        if not self.channel.wait():
            return False
        self.growth.before_first_step()
        self.tokens = self.steps = 0
        self.start, self.busy = time.perf_counter(), time.process_time()
        return True

    def stepped(self) -> bool:
        """After an optimizer step."""
        self.steps += 1
        if self.tokens < self.wanted:
            return True
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.start
        self.channel.answer(
            value=self.tokens / seconds, tokens=self.tokens, seconds=seconds, steps=self.steps,
            grown=self.growth.grown(), cpu_seconds=time.process_time() - self.busy,
        )  # fmt: skip
        return self.begin()


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


def worker(job: dict[str, Any], channel: Channel) -> None:
    """Rounds of whole steps until `tokens` real tokens; the value is real tokens per second."""
    peer = Peer(**job["peer"])
    if peer.fp32_products is not None:
        matmul: Any = torch.backends.mkldnn
        matmul.matmul.fp32_precision = peer.fp32_products
    clock = Clock(channel, job)
    with redirect_stdout(sys.stderr):
        {"trl": _trl, "trainer": _trainer, "loop": _loop}[peer.trainer](peer, job, clock)


def lora_config(lora: dict[str, Any]) -> LoraConfig:
    """The adapter of the job, for PEFT."""
    return LoraConfig(
        task_type="CAUSAL_LM", r=lora["rank"], lora_alpha=lora["alpha"], lora_dropout=0.0, fan_in_fan_out=True,
        target_modules=lora["targets"],
    )  # fmt: skip


def load_base(peer: Peer, job: dict[str, Any]) -> Any:
    """The base as this peer holds it."""
    options: dict[str, Any] = {"attn_implementation": peer.attention} if peer.attention else {}
    if peer.dropout is not None:
        options |= {f"{kind}_pdrop": peer.dropout for kind in ("resid", "embd", "attn")}
    return AutoModelForCausalLM.from_pretrained(job["base"], dtype=getattr(torch, peer.weights), **options)


def _arguments(peer: Peer, job: dict[str, Any], out: str) -> dict[str, Any]:
    own = {
        "output_dir": out, "max_steps": 1_000_000, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "use_cpu": job["device"] == "cpu", "seed": job["seed"],
    }  # fmt: skip
    return {**own, **peer.arguments}


def _run(trainer: Any, peer: Peer, clock: Clock) -> None:
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
    threads = torch.get_num_threads()
    clock.channel.ready(
        settings={**peer.settings(), "batch": trainer.args.per_device_train_batch_size, "threads": threads}
    )
    trainer.train()


def _trl(peer: Peer, job: dict[str, Any], clock: Clock) -> None:
    from datasets import load_dataset

    trl: Any = importlib.import_module("trl")  # loads its names late, which a type checker cannot follow

    with tempfile.TemporaryDirectory() as out:
        data = load_dataset("json", data_files=job["documents"], cache_dir=out, split="train")
        trainer = trl.SFTTrainer(
            model=load_base(peer, job),
            args=trl.SFTConfig(**_arguments(peer, job, out)),
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(job["base"]),
            peft_config=lora_config(job["lora"]),
        )
        _run(trainer, peer, clock)


def _trainer(peer: Peer, job: dict[str, Any], clock: Clock) -> None:
    from datasets import Dataset
    from transformers import DataCollatorForLanguageModeling

    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    tokenizer.pad_token = tokenizer.eos_token
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in examples(job, tokenizer)]
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(
            model=get_peft_model(load_base(peer, job), lora_config(job["lora"])),
            args=TrainingArguments(**_arguments(peer, job, out)),
            train_dataset=Dataset.from_list(rows),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        _run(trainer, peer, clock)


def _loop(peer: Peer, job: dict[str, Any], clock: Clock) -> None:
    """The leanest loop around PEFT: padded batches, AdamW, nothing else."""
    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    model = get_peft_model(load_base(peer, job), lora_config(job["lora"])).to(job["device"]).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    size = peer.arguments.get("per_device_train_batch_size", job["batch"])
    low = peer.weights == "bfloat16"
    clock.channel.ready(settings={**peer.settings(), "batch": size, "threads": torch.get_num_threads()})
    going = clock.begin()
    for ids, mask, tokens in _padded(list(examples(job, tokenizer)), size, tokenizer.eos_token_id, job["device"]):
        if not going:
            return
        clock.tokens += tokens
        dense = tokens == ids.numel()
        with torch.autocast(job["device"], torch.bfloat16, enabled=low):
            labels = ids.masked_fill(mask == 0, -100)
            loss = model(input_ids=ids, attention_mask=None if dense else mask, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        going = clock.stepped()


def examples(job: dict[str, Any], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of each document with `<|endoftext|>` at its end."""
    for line in Path(job["documents"]).read_text(encoding="utf-8").splitlines():
        yield [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]


def _padded(
    rows: list[list[int]], size: int, pad: int, device: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Batches of `size` documents, their masks and their real tokens, without end."""
    while True:
        for first in range(0, len(rows) - size + 1, size):
            batch = rows[first : first + size]
            width = max(map(len, batch))
            ids = torch.tensor([row + [pad] * (width - len(row)) for row in batch], device=device)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=device)
            yield ids, mask, sum(map(len, batch))
