"""B8, B10: writing texts with one adapter, with many in one batch, and merged, against `generate` and PEFT.

    python -m benchmarks.decoding [--shape small] [--batch 8] [--new 64] [--precision bf16] [--tokenizer DIR]

A round writes `--new` tokens greedily after prompts of `--prompt` random tokens, all rows of a batch at once; the value
is tokens a second, prompts included in the time. Ours goes through the engine, text and all; the peers return ids.
Batches: all rows on a merged checkpoint, on one adapter, on 3 adapters in turn, on one each, and `--many` rows on 3
and on `--many` adapters. The gate compares logits, and the greedy texts where the tokenizer has the whole vocabulary.
"""

from __future__ import annotations

import shutil
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from benchmarks.machine import versions
from benchmarks.measure import Result, Row, finish, ratio
from benchmarks.options import Setup, add_adapter, parse, parser, prepared, targets_of
from benchmarks.rounds import Channel, Contestant, interleave

Rows = list[int | None]


def serve(job: dict[str, Any], channel: Channel) -> None:
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

    bank = AdapterBank(job["base"], job["precision"], "cpu")
    for number in sorted(set(job["rows"]) - {None}):
        bank.add(f"a{number}", job["adapters"][number])
    settings = GenerationSettings(max_new_tokens=job["new"], temperature=0)
    engine = Engine(bank, slots=len(job["rows"]), queue=len(job["rows"]))

    def write(prompts: list[list[int]]) -> list[list[int]]:
        texts: list[list[int]] = [[] for _ in prompts]
        for ids, row, text in zip(prompts, job["rows"], texts, strict=True):
            name = f"a{row}" if row is not None else None
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
    return AutoModelForCausalLM.from_pretrained(job["base"], dtype=dtype).eval()


def _writer(job: dict[str, Any], model: Any, extra: dict[str, Any]) -> Any:
    import torch

    fixed = {"do_sample": False, "max_new_tokens": job["new"], "min_new_tokens": job["new"], "pad_token_id": 0, **extra}

    @torch.inference_mode()
    def write(prompts: list[list[int]]) -> list[list[int]]:
        ids = torch.tensor(prompts)
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **fixed)
        return written[:, ids.shape[1] :].tolist()  # type: ignore[no-any-return]

    return write


def gate(setup: Setup, adapters: list[str]) -> dict[str, Any]:
    """Largest difference of the logits of a mixed batch from PEFT's, in fp32, relative to their size."""
    import torch
    from peft import PeftModel

    from peftune.inference.bank import AdapterBank

    job = {"base": str(setup.base), "precision": "fp32", "rows": [0, 1, None], "prompt": 32, "seed": 1}
    ids = torch.tensor(prompts_of(job))
    bank = AdapterBank(str(setup.base), "fp32", "cpu")
    for number in (0, 1):
        bank.add(f"a{number}", adapters[number])
    mixed, worst = bank.logits(ids, ["a0", "a1", None]), 0.0
    for row, number in enumerate((0, 1)):
        with torch.inference_mode():
            logits = PeftModel.from_pretrained(_model(job), adapters[number]).eval()(ids[row : row + 1]).logits[0]
        worst = max(worst, float((mixed[row] - logits).norm() / logits.norm()))
    if not worst < 1e-5:
        raise SystemExit(f"logits of a mixed batch are {worst:.1e} from PEFT's, expected less than 1e-5")
    return {"logits of a mixed batch from PEFT's, relative": f"{worst:.1e}", "expected": "< 1e-5"}


def run(arguments: Namespace) -> Result:
    """Adapters, a merged checkpoint, gate, rounds, rows."""
    from benchmarks.merge_memory import make_adapters
    from peftune.adapters.merge.merge import merge

    a = arguments
    with prepared(a) as setup:
        count = max(a.batch, a.many, 3)
        made = make_adapters(setup.root, a.shape.config(), a.rank, targets_of(a.targets), count)
        adapters = [str(directory) for directory in made]
        merged = setup.root / "merged"
        shutil.rmtree(merged, ignore_errors=True)
        merge(Path(adapters[0]), merged, base=str(setup.base), verify=False)
        found = gate(setup, adapters)
        everyone = _contestants(a, setup.base, merged, adapters)
        for group in _groups(everyone):  # one after the other: ten processes at once may not fit
            interleave(group, a.rounds, a.warmup, setup.environment())
        told = {"batch": a.batch, "prompt": a.prompt, "new": a.new, "precision": a.precision}
        adapter = {"adapters": f"rank {a.rank} on {a.targets}, {a.many} of them at most"}
        result = Result(
            "B8", "writing with one base and many adapters", {**setup.told(), **told, **adapter}, gate=found
        )
    result.add(list(everyone.values()))
    result.rows = _rows(a, everyone)
    return result


def _contestants(a: Namespace, base: Path, merged: Path, adapters: list[str]) -> dict[str, Contestant]:
    fixed = {"adapters": adapters, "precision": a.precision, "prompt": a.prompt, "new": a.new, "seed": a.seed}
    one, three, each = [0] * a.batch, [row % 3 for row in range(a.batch)], list(range(a.batch))
    batches: dict[str, tuple[str, Path, Rows]] = {
        "merged": ("ours", merged, [None] * a.batch),
        "one adapter": ("ours", base, list(one)),
        "3 adapters": ("ours", base, list(three)),
        "one each": ("ours", base, list(each)),
        f"{a.many} rows, merged": ("ours", merged, [None] * a.many),
        f"{a.many} rows, 3 adapters": ("ours", base, [row % 3 for row in range(a.many)]),
        f"{a.many} rows, one each": ("ours", base, list(range(a.many))),
        "transformers generate, merged": ("generate", merged, [None] * a.batch),
        "PEFT, set_adapter": ("peft", base, list(one)),
        "PEFT, mixed batch": ("peft", base, list(each)),
    }
    return {
        name: Contestant(
            name, "benchmarks.decoding", {"way": way, "base": str(model), "rows": rows, **fixed}, "tok/s",
            must_run=way == "ours",
        )
        for name, (way, model, rows) in batches.items()
    }  # fmt: skip


def _groups(everyone: dict[str, Contestant]) -> list[list[Contestant]]:
    """Those with as many rows, which are compared with each other."""
    sizes = sorted({len(one.job["rows"]) for one in everyone.values()})
    return [[one for one in everyone.values() if len(one.job["rows"]) == size] for size in sizes]


def _rows(a: Namespace, everyone: dict[str, Contestant]) -> list[Row]:
    merged, one, three, each, many_merged, many_three, many_each, peer, peft_one, peft_mixed = everyone.values()
    peer_version, peft_version = (versions().get(name, "?") for name in ("transformers", "peft"))
    generate = f"generate, transformers {peer_version}"
    return [
        Row("B8", f"{a.batch} rows, one adapter each", "one merged checkpoint", ratio(each, merged), 0.85, "at least"),
        Row("B8", f"{a.batch} rows, 3 adapters", "one merged checkpoint", ratio(three, merged), 0.95, "at least"),
        Row("B8", f"{a.many} rows, one adapter each", "3 adapters", ratio(many_each, many_three), 0.95, "at least"),
        Row("B8", f"{a.many} rows, 3 adapters", "merged", ratio(many_three, many_merged), 0, "information"),
        Row("B8", "one adapter each", f"PEFT {peft_version}, mixed", ratio(each, peft_mixed), 0, "information",
            reason=peft_mixed.failure or ""),
        Row("B8", "one adapter", f"PEFT {peft_version}, set_adapter", ratio(one, peft_one), 0, "information",
            reason=peft_one.failure or ""),
        Row("B10", f"write, {a.batch} rows, {a.precision}", generate, ratio(merged, peer), 2, "at least",
            reason=peer.failure or ""),
    ]  # fmt: skip


def main() -> None:
    """Measure and tell."""
    made = parser(__doc__, rounds=3)
    made.add_argument("--batch", type=int, default=8, help="rows of a batch")
    made.add_argument("--many", type=int, default=64, help="rows and adapters of the largest batch")
    made.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    made.add_argument("--new", type=int, default=64, help="tokens to write")
    made.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    add_adapter(made)
    arguments = parse(made)
    finish(run(arguments), arguments.json)


if __name__ == "__main__":
    main()
