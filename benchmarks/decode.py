"""Generating with one adapter and with many in a batch, and switching between them, against PEFT and Transformers."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import versions
from benchmarks.harness.options import ADAPTER, Benchmark, Setup, main
from benchmarks.harness.report import Result, compare, row, spread
from benchmarks.harness.workers import Channel, Contestant

_SWAPS = 200


def decode_worker(job: dict[str, Any], channel: Channel) -> None:
    """One round is one batch, written to its end; the value is tokens a second."""
    write = {"ours": _ours, "generate": _generate, "peft": _peft}[job["way"]](job)
    settings = {key: job[key] for key in ("way", "precision", "new")}
    channel.ready(settings=settings | {"rows": len(job["rows"]), "adapters": len(set(job["rows"]) - {None})})
    for _ in channel.rounds():
        start = time.perf_counter()
        texts = write(prompts_of(job))
        channel.answer(sum(map(len, texts)) / (time.perf_counter() - start), texts=texts if job["new"] <= 16 else None)


def prompts_of(job: dict[str, Any]) -> list[list[int]]:
    """The same random prompts for everyone, of ids that every tokenizer here has."""
    import torch

    random = torch.Generator().manual_seed(job["seed"])
    return torch.randint(0, 4000, (len(job["rows"]), job["prompt"]), generator=random).tolist()  # type: ignore[no-any-return]


def _ours(job: dict[str, Any]) -> Any:
    from peftune.inference.bank import AdapterBank
    from peftune.inference.engine import Engine
    from peftune.inference.request import Request
    from peftune.inference.settings import GenerationSettings

    bank = AdapterBank(job["base"], job["precision"], job["device"])
    for number in sorted(set(job["rows"]) - {None}):
        bank.add(f"a{number}", job["adapters"][number])
    settings = GenerationSettings(max_new_tokens=job["new"], temperature=0)
    engine = Engine(bank, slots=len(job["rows"]), queue=len(job["rows"]))

    def write(prompts: list[list[int]]) -> list[list[int]]:
        texts: list[list[int]] = [[] for _ in prompts]
        for ids, number, text in zip(prompts, job["rows"], texts, strict=True):
            name = f"a{number}" if number is not None else None
            engine.submit(Request(tuple(ids), name, settings), lambda update, text=text: text.extend(update.ids))
        while engine.step():
            pass
        return texts

    return write


def _generate(job: dict[str, Any]) -> Any:
    return _writer(job, _model(job), {})


def _peft(job: dict[str, Any]) -> Any:
    from peft import PeftModel

    numbers = sorted(set(job["rows"]) - {None})
    model = PeftModel.from_pretrained(_model(job), job["adapters"][numbers[0]], adapter_name=f"a{numbers[0]}")
    for number in numbers[1:]:
        model.load_adapter(job["adapters"][number], f"a{number}")
    mixed = {"adapter_names": [f"a{row}" for row in job["rows"]]} if len(numbers) > 1 else {}
    return _writer(job, model.eval(), mixed)


def _model(job: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job["precision"]]
    return AutoModelForCausalLM.from_pretrained(job["base"], dtype=dtype).eval().to(job["device"])


def _writer(job: dict[str, Any], model: Any, extra: dict[str, Any]) -> Any:
    import torch

    fixed = {"do_sample": False, "max_new_tokens": job["new"], "min_new_tokens": job["new"], "pad_token_id": 0, **extra}

    @torch.inference_mode()
    def write(prompts: list[list[int]]) -> list[list[int]]:
        ids = torch.tensor(prompts, device=job["device"])
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **fixed)
        return written[:, ids.shape[1] :].tolist()  # type: ignore[no-any-return]

    return write


def gate(setup: Setup, adapters: list[str]) -> dict[str, Any]:
    """Largest difference of the logits of a mixed batch from PEFT's, in fp32, relative to their size."""
    import torch
    from peft import PeftModel

    from peftune.inference.bank import AdapterBank

    job = {"base": str(setup.base), "precision": "fp32", "rows": [0, 1, None], "prompt": 32, "seed": 1}
    job["device"] = setup.arguments.device
    ids = torch.tensor(prompts_of(job), device=job["device"])
    bank = AdapterBank(str(setup.base), "fp32", job["device"])
    for number in (0, 1):
        bank.add(f"a{number}", adapters[number])
    mixed, worst = bank.logits(ids, ["a0", "a1", None]), 0.0
    for i, number in enumerate((0, 1)):
        with torch.inference_mode():
            logits = PeftModel.from_pretrained(_model(job), adapters[number]).eval()(ids[i : i + 1]).logits[0].cpu()
        worst = max(worst, float((mixed[i].cpu() - logits).norm() / logits.norm()))
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
    from peftune.adapters.merge.merge import merge

    a = setup.arguments
    adapters, merged = setup.adapters(max(a.batch, a.many, 3)), setup.root / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    merge(Path(adapters[0]), merged, base=str(setup.base), verify=False)
    found = gate(setup, adapters)
    everyone = _contestants(setup, merged, adapters)
    for rows in sorted({len(c.job["rows"]) for c in everyone}):  # one size after the other: all at once may not fit
        setup.interleave([c for c in everyone if len(c.job["rows"]) == rows])
    settings = {
        "batch": a.batch,
        "prompt": a.prompt,
        "new": a.new,
        "precision": a.precision,
        "adapters at most": a.many,
    }
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


def _contestants(setup: Setup, merged: Path, adapters: list[str]) -> list[Contestant]:
    a, base = setup.arguments, setup.base
    settings = {"adapters": adapters, **{key: vars(a)[key] for key in ("precision", "prompt", "new", "seed", "device")}}
    most = max(a.batch, a.many)
    none, one, three, each = [None] * most, [0] * most, [r % 3 for r in range(most)], list(range(most))
    batches: list[tuple[str, str, Path, list[Any], int]] = [
        ("merged", "ours", merged, none, a.batch),
        ("one adapter", "ours", base, one, a.batch),
        ("3 adapters", "ours", base, three, a.batch),
        ("one each", "ours", base, each, a.batch),
        (f"{a.many} rows, merged", "ours", merged, none, a.many),
        (f"{a.many} rows, 3 adapters", "ours", base, three, a.many),
        (f"{a.many} rows, one each", "ours", base, each, a.many),
        ("transformers generate, merged", "generate", merged, none, a.batch),
        ("PEFT, set_adapter", "peft", base, one, a.batch),
        ("PEFT, mixed batch", "peft", base, each, a.batch),
    ]
    made = []
    for name, way, model, rows, count in batches:
        job = {"way": way, "base": str(model), "rows": rows[:count], **settings}
        made.append(Contestant(name, "benchmarks.decode:decode_worker", job, "tok/s", must_run=way == "ours"))
    return made


def swap_worker(job: dict[str, Any], channel: Channel) -> None:
    """One round is many swaps there and back; the value is milliseconds of one."""
    ways = {"use": _use, "slot": _slot, "add": _add, "set_adapter": _set_adapter, "hotswap": _hotswap}
    swap = ways[job["way"]](job)
    channel.ready(settings={"way": job["way"]})
    for _ in channel.rounds():
        start = time.perf_counter()
        for number in range(_SWAPS):
            swap(number % 2)
        channel.answer((time.perf_counter() - start) / _SWAPS * 1e3)


Swap = Callable[[int], object]


def _bank(job: dict[str, Any]) -> Any:
    from peftune.inference.bank import AdapterBank

    bank = AdapterBank(job["base"], device=job["device"])
    for number, directory in enumerate(job["adapters"]):
        bank.add(f"a{number}", directory)
    return bank


def _use(job: dict[str, Any]) -> Swap:
    from peftune.model.decode.lora_slots import AdapterSlots

    bank, slots = _bank(job), AdapterSlots(1)

    def swap(number: int) -> object:
        bank.use(f"a{number}")
        return slots.factors([0], [bank.variant(f"a{number}").lora])

    return swap


def _slot(job: dict[str, Any]) -> Swap:
    import torch

    from peftune.model.decode.lora_slots import AdapterSlots

    bank, slots = _bank(job), AdapterSlots(2)
    both = [bank.variant(f"a{number}").lora for number in (0, 1)]
    return torch.inference_mode()(lambda number: slots.factors([0, 1], [both[number], both[1 - number]]))


def _add(job: dict[str, Any]) -> Swap:
    bank = _bank(job)

    def swap(number: int) -> object:
        bank.remove(f"a{number}")
        return bank.add(f"a{number}", job["adapters"][number])

    return swap


def _peft_model(job: dict[str, Any]) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(job["base"]), job["adapters"][0], "a0")
    model.load_adapter(job["adapters"][1], "a1")
    return model.eval().to(job["device"])


def _set_adapter(job: dict[str, Any]) -> Swap:
    model = _peft_model(job)
    return lambda number: model.set_adapter(f"a{number}")


def _hotswap(job: dict[str, Any]) -> Swap:
    from peft.utils.hotswap import hotswap_adapter

    model = _peft_model(job)
    return lambda number: hotswap_adapter(model, job["adapters"][number], "a0", torch_device=job["device"])


def swap(setup: Setup) -> Result:
    """B7: from one adapter to another, in memory and from disk, against PEFT's `set_adapter` and `hotswap_adapter`.

    python -m benchmarks.decode swap [--shape small] [--rank 8] [--targets c_attn]

    Milliseconds a swap. In memory: `AdapterBank.use` and what the next batch does because of it, for a batch of one
    adapter (nothing is copied) and for a slot of a mixed batch (its A and B are copied into the stacks). From disk:
    `AdapterBank.add` and `remove`, with all that is checked: the base's fingerprint, every name, shape and value.
    """
    job = {"base": str(setup.base), "adapters": setup.adapters(2), "device": setup.arguments.device}
    names = {"use": "in memory", "slot": "in memory, two slots", "add": "from disk",
             "set_adapter": "PEFT set_adapter", "hotswap": "PEFT hotswap_adapter"}  # fmt: skip
    everyone = [
        Contestant(name, "benchmarks.decode:swap_worker", {**job, "way": way}, "ms", not name.startswith("PEFT"))
        for way, name in names.items()
    ]
    setup.interleave(everyone)
    use, slot, add, set_adapter, hotswap = everyone
    peft = f"PEFT {versions().get('peft', '?')}"
    result = Result("B7", "from one adapter to another", setup.settings()).add(everyone)
    result.rows = [
        row("B7 memory", "swap in memory", "the clock", spread(use.values()), "ms"),
        row("B7 disk", "swap from disk, checked", "the clock", spread(add.values()), "ms"),
        row("B7", "swap of two slots of a mixed batch", "the clock", spread(slot.values()), "ms"),
        compare("B7", "swap in memory", set_adapter, use, f"{peft} set_adapter"),
        compare("B7", "swap from disk", hotswap, add, f"{peft} hotswap_adapter"),
    ]
    return result


_OPTIONS: dict[str, dict[str, Any]] = ADAPTER | {
    "batch": {"type": int, "default": 8, "help": "rows of a batch"},
    "many": {"type": int, "default": 64, "help": "rows and adapters of the largest batch"},
    "prompt": {"type": int, "default": 32, "help": "tokens of a prompt"},
    "new": {"type": int, "default": 64, "help": "tokens to generate"},
    "precision": {"choices": ["fp32", "bf16"], "default": "bf16"},
}
BENCHMARKS = {
    "speed": Benchmark(speed, _OPTIONS, {"rounds": 3}),
    "swap": Benchmark(swap, ADAPTER, {"rounds": 3}),
}

if __name__ == "__main__":
    main("decode", BENCHMARKS)
