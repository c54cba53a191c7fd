"""Generating with one adapter and with many in a batch, and switching between them, against PEFT and Transformers."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForCausalLM

from benchmarks.harness.machine import versions
from benchmarks.harness.options import Setup, main
from benchmarks.harness.report import Result, compare, row
from benchmarks.harness.workers import Channel, Contestant
from peftune.adapters.merge.merge import merge
from peftune.inference.bank import AdapterBank
from peftune.inference.engine import Engine
from peftune.inference.request import Request
from peftune.inference.settings import GenerationSettings
from peftune.model.decode.captured_steps import VARIABLE
from peftune.model.decode.lora_slots import AdapterSlots
from peftune.model.load import DTYPES

_SWAPS = 200
Write = Callable[[list[list[int]]], list[list[int]]]
"""From the prompts of a batch to what follows on each, as token ids."""


def decode_worker(job: dict[str, Any], channel: Channel) -> None:
    """One round is one batch, written to its end; the value is tokens a second."""
    os.environ[VARIABLE] = job.get("graphs", "1")
    numbers = sorted(set(job["rows"]) - {None})
    write = _by_engine(job, numbers) if job["way"] == "ours" else _by_generate(job, numbers)
    settings = {key: job[key] for key in ("way", "precision", "new")}
    for _ in channel.rounds(**settings, rows=len(job["rows"]), adapters=len(numbers)):
        start = time.perf_counter()
        texts = write(prompts_of(job))
        channel.send(value=sum(map(len, texts)) / (time.perf_counter() - start))


def prompts_of(job: dict[str, Any]) -> list[list[int]]:
    """The same random prompts for everyone, of ids that every tokenizer here has."""
    random = torch.Generator().manual_seed(job["seed"])
    return torch.randint(0, 4000, (len(job["rows"]), job["prompt"]), generator=random).tolist()  # type: ignore[no-any-return]


def _bank(job: dict[str, Any], numbers: Sequence[int]) -> Any:
    """Ours, with these adapters."""
    bank = AdapterBank(job["base"], job["precision"], job["device"])
    for number in numbers:
        bank.add(f"a{number}", job["adapters"][number])
    return bank


def _peft(job: dict[str, Any], numbers: Sequence[int]) -> Any:
    """Transformers' model, with these adapters on it by PEFT."""
    model = AutoModelForCausalLM.from_pretrained(job["base"], dtype=DTYPES[job["precision"]])
    for number in numbers[:1]:
        model = PeftModel.from_pretrained(model, job["adapters"][number], f"a{number}")
    for number in numbers[1:]:
        model.load_adapter(job["adapters"][number], f"a{number}")
    return model.eval().to(job["device"])


def _by_engine(job: dict[str, Any], numbers: Sequence[int]) -> Write:
    settings = GenerationSettings(max_new_tokens=job["new"], temperature=0)
    engine = Engine(_bank(job, numbers), slots=len(job["rows"]), queue=len(job["rows"]))

    def write(prompts: list[list[int]]) -> list[list[int]]:
        texts: list[list[int]] = [[] for _ in prompts]
        for ids, number, text in zip(prompts, job["rows"], texts, strict=True):
            name = f"a{number}" if number is not None else None
            engine.submit(Request(tuple(ids), name, settings), lambda output, text=text: text.extend(output.ids))
        while engine.step():
            pass
        return texts

    return write


def _by_generate(job: dict[str, Any], numbers: Sequence[int]) -> Write:
    model, length = _peft(job, numbers), job["new"]
    fixed = {"do_sample": False, "max_new_tokens": length, "min_new_tokens": length, "pad_token_id": 0}
    if len(numbers) > 1:
        fixed["adapter_names"] = [f"a{row}" for row in job["rows"]]

    @torch.inference_mode()
    def write(prompts: list[list[int]]) -> list[list[int]]:
        ids = torch.tensor(prompts, device=job["device"])
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **fixed)
        return written[:, ids.shape[1] :].tolist()  # type: ignore[no-any-return]

    return write


def gate(job: dict[str, Any]) -> dict[str, Any]:
    """Largest difference of the logits of a mixed batch from PEFT's, in fp32, relative to their size."""
    job = job | {"precision": "fp32", "rows": [0, 1, None], "prompt": 32, "seed": 1}
    ids = torch.tensor(prompts_of(job), device=job["device"])
    mixed, peft, worst = _bank(job, (0, 1)).logits(ids, ["a0", "a1", None]).cpu(), _peft(job, (0, 1)), 0.0
    for i in (0, 1):
        peft.set_adapter(f"a{i}")
        with torch.inference_mode():
            logits = peft(ids[i : i + 1]).logits[0].cpu()
        worst = max(worst, float((mixed[i] - logits).norm() / logits.norm()))
    if not worst < 1e-5:
        raise SystemExit(f"logits of a mixed batch are {worst:.1e} from PEFT's, expected less than 1e-5")
    return {"logits of a mixed batch from PEFT's, relative": f"{worst:.1e}", "expected": "< 1e-5"}


def speed(setup: Setup) -> Result:
    """B8, B10: generating with one adapter, with many in one batch, and merged, against `generate` and PEFT.

    python -m benchmarks.decode speed [--shape small] [--batch 8] [--new 64] [--precision bf16] [--tokenizer DIR]

    A round generates `--new` tokens greedily after prompts of `--prompt` random tokens, all rows of a batch at once;
    the value is tokens a second, prompts included in the time. Ours goes through the engine, text and all; the peers
    return ids. Batches: all rows on a merged checkpoint, on one adapter, on 3 adapters in turn, on one each, and
    `--many` rows on 3 and on `--many` adapters. The gate compares logits.
    """
    a, base, merged = setup.arguments, str(setup.base), str(setup.root / "merged")
    most = max(a.batch, a.many, 3)
    job = {"base": base, "adapters": setup.adapters(most)}
    job |= {key: vars(a)[key] for key in ("precision", "prompt", "new", "seed", "device")}
    shutil.rmtree(merged, ignore_errors=True)
    merge(Path(job["adapters"][0]), Path(merged), base=base, verify=False)
    found = gate(job)
    none, one, three, each = [None] * most, [0] * most, [r % 3 for r in range(most)], list(range(most))
    batches: dict[str, tuple[str, str, list[Any], int]] = {
        "merged": ("ours", merged, none, a.batch),
        "one adapter": ("ours", base, one, a.batch),
        "3 adapters": ("ours", base, three, a.batch),
        "one each": ("ours", base, each, a.batch),
        f"{a.many} rows, merged": ("ours", merged, none, a.many),
        f"{a.many} rows, 3 adapters": ("ours", base, three, a.many),
        f"{a.many} rows, one each": ("ours", base, each, a.many),
        "transformers generate, merged": ("generate", merged, none, a.batch),
        "PEFT, set_adapter": ("peft", base, one, a.batch),
        "PEFT, mixed batch": ("peft", base, each, a.batch),
    }
    worker = "benchmarks.decode:decode_worker"
    everyone = [
        Contestant(name, worker, job | {"way": way, "base": model, "rows": rows[:count]}, "tok/s", way == "ours")
        for name, (way, model, rows, count) in batches.items()
    ]
    for count in sorted({a.batch, a.many}):  # one size after the other: all at once may not fit
        setup.interleave([c for c in everyone if len(c.job["rows"]) == count])
    settings = {key: job[key] for key in ("prompt", "new", "precision")}
    settings |= {"batch": a.batch, "adapters at most": a.many}
    result = Result("B8", "generating with one base and many adapters", setup.settings(**settings), found).add(everyone)
    same, one, three, each, many_same, many_three, many_each, peer, peft_one, peft_mixed = everyone
    transformers, peft = (f"{name} {versions().get(name.lower(), '?')}" for name in ("transformers", "PEFT"))
    result.rows = [
        compare("B8 each", f"{a.batch} rows, one adapter each", each, same, "one merged checkpoint"),
        compare("B8 three", f"{a.batch} rows, 3 adapters", three, same, "one merged checkpoint"),
        compare("B8 many", f"{a.many} rows, one adapter each", many_each, many_three, "3 adapters"),
        compare("B8", f"{a.many} rows, 3 adapters", many_three, many_same, "merged"),
        compare("B8", "one adapter each", each, peft_mixed, f"{peft}, mixed"),
        compare("B8", "one adapter", one, peft_one, f"{peft}, set_adapter"),
        compare("B10 generate", f"write, {a.batch} rows, {a.precision}", same, peer, f"generate, {transformers}"),
    ]
    return result


def swap_worker(job: dict[str, Any], channel: Channel) -> None:
    """One round is many swaps there and back; the value is milliseconds of one."""
    swap = swap_of(job["way"], job)
    for _ in channel.rounds(way=job["way"]):
        start = time.perf_counter()
        for number in range(_SWAPS):
            swap(number % 2)
        channel.send(value=(time.perf_counter() - start) / _SWAPS * 1e3)


def swap_of(way: str, job: dict[str, Any]) -> Callable[[int], object]:
    """What brings adapter 0 or 1 into use, in this way."""
    if way in ("set_adapter", "hotswap"):
        model, paths = _peft(job, (0, 1)), job["adapters"]
        if way == "set_adapter":
            return lambda number: model.set_adapter(f"a{number}")
        return lambda number: hotswap_adapter(model, paths[number], "a0", torch_device=job["device"])
    bank, slots = _bank(job, (0, 1)), AdapterSlots(2 if way == "slot" else 1)
    both = [bank.variant(f"a{number}").lora for number in (0, 1)]
    ask: Callable[..., object] = slots.factors if job["device"] == "cpu" else slots.stacked

    def use(number: int) -> object:
        bank.use(f"a{number}")
        return ask([0], [bank.variant(f"a{number}").lora])

    def add(number: int) -> object:
        bank.remove(f"a{number}")
        return bank.add(f"a{number}", job["adapters"][number])

    @torch.inference_mode()
    def slot(number: int) -> object:
        more = {"one_token": True} if job["device"] == "cpu" else {}
        return ask([0, 1], [both[number], both[1 - number]], **more)

    return {"use": use, "add": add, "slot": slot}[way]


def swap(setup: Setup) -> Result:
    """B7: from one adapter to another, in memory and from disk, against PEFT's `set_adapter` and `hotswap_adapter`.

    python -m benchmarks.decode swap [--shape small] [--rank 8] [--targets c_attn]

    Milliseconds a swap. In memory: `AdapterBank.use` and what the next batch does because of it, for a batch of one
    adapter (nothing is copied) and for a slot of a mixed batch (its A and B are copied into the stacks). From disk:
    `AdapterBank.add` and `remove`, with all that is checked: the base's fingerprint, every name, shape and value.
    """
    job = {"base": str(setup.base), "adapters": setup.adapters(2), "device": setup.arguments.device}
    job |= {"precision": "fp32"}
    names = {"use": "in memory", "slot": "in memory, two slots", "add": "from disk",
             "set_adapter": "PEFT set_adapter", "hotswap": "PEFT hotswap_adapter"}  # fmt: skip
    worker, ours = "benchmarks.decode:swap_worker", ("use", "slot", "add")
    everyone = [Contestant(name, worker, job | {"way": way}, "ms", way in ours) for way, name in names.items()]
    result = setup.measure("B7", "from one adapter to another", everyone)
    use, slot, add, set_adapter, hotswap = everyone
    peft = f"PEFT {versions().get('peft', '?')}"
    result.rows = [
        row("B7 memory", "swap in memory", "the clock", use.values(), "ms"),
        row("B7 disk", "swap from disk, checked", "the clock", add.values(), "ms"),
        row("B7", "swap of two slots of a mixed batch", "the clock", slot.values(), "ms"),
        compare("B7", "swap in memory", set_adapter, use, f"{peft} set_adapter"),
        compare("B7", "swap from disk", hotswap, add, f"{peft} hotswap_adapter"),
    ]
    return result


BENCHMARKS = {"speed": speed, "swap": swap}

if __name__ == "__main__":
    main("decode", BENCHMARKS)
