"""Merging an adapter into its base, and holding a base in fewer bits: time, memory, errors."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2LMHeadModel  # noqa: F401  # loaded late

from benchmarks.harness.machine import versions
from benchmarks.harness.memory import MemoryGrowth, largest, process_memory
from benchmarks.harness.options import Setup, main
from benchmarks.harness.report import Result, compare, row
from benchmarks.harness.workers import Channel, Contestant
from peftune.adapters.merge.merge import merge
from peftune.config.recipe import LoraSection
from peftune.data.sources.builtin import documents
from peftune.model.base import Base
from peftune.model.load import DTYPES, footprint, load_model
from peftune.model.lora import inject
from peftune.model.quantized import loading_options

WAYS = {
    "peftune": "ours", "peftune, verified": "verified",
    "PEFT": "peft", "PEFT, on disk": "peft-synced", "cp": "cp", "cp, on disk": "cp-synced",
}  # fmt: skip
"""«On disk» waits until the disk has it, as peftune does: a directory appears complete even if power fails."""
PRECISIONS = ("fp32", "bf16", "int8", "nf4")


def merge_worker(job: dict[str, Any], channel: Channel) -> None:
    """One round is one merge into a new directory; the value is its seconds."""
    base, adapter, out = Path(job["base"]), Path(job["adapter"]), Path(job["out"])
    way, _, synced = job["way"].partition("-")
    work = {"ours": _by_peftune, "verified": _by_peftune, "peft": _by_peft, "cp": _by_cp}[way]
    growth = MemoryGrowth()
    for _ in channel.rounds(way=job["way"], dtype=job["dtype"]):
        shutil.rmtree(out, ignore_errors=True)
        growth.begin()
        start = time.perf_counter()
        with redirect_stdout(sys.stderr):
            report = work(base, adapter, out, job)
        for file in out.glob("*.safetensors") if synced else []:
            with file.open("r+b") as opened:
                os.fsync(opened.fileno())
        channel.send(
            value=time.perf_counter() - start, grown=growth.grown(), files=growth.files(), peak=process_memory("VmHWM"),
            report=report,
        )  # fmt: skip


def _by_peftune(base: Path, adapter: Path, out: Path, job: dict[str, Any]) -> dict[str, str]:
    report = merge(adapter, out, base=str(base), verify=job["way"] == "verified", dtype=job["dtype"])
    return {key: str(value) for key, value in asdict(report).items()}


def _by_peft(base: Path, adapter: Path, out: Path, _: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)


def _by_cp(base: Path, _: Path, out: Path, __: dict[str, Any]) -> None:
    subprocess.run(["cp", "-r", str(base), str(out)], check=True)


def differing(ours: Path, other: Path) -> dict[str, float]:
    """Tensors that are not bit for bit the same in two merged directories, and how far off at most (inf: absent)."""
    a, b = Base(ours).weights, Base(other).weights
    found = {name: math.inf for name in set(a.names()) ^ set(b.names())}
    for name in sorted(set(a.names()) & set(b.names())):
        difference = float((a.tensor(name) - b.tensor(name)).abs().max())
        found |= {name: difference} if difference else {}
    return found


def _contestant(setup: Setup, name: str, way: str, adapter: str, dtype: str = "float32") -> Contestant:
    job = {"way": way, "base": str(setup.base), "adapter": adapter, "out": str(setup.root / f"out-{way}")}
    return Contestant(name, "benchmarks.merge:merge_worker", job | {"dtype": dtype}, "s", name.startswith("peftune"))


def speed(setup: Setup) -> Result:
    """B6: merging an adapter into its base, against PEFT's merge_and_unload + save_pretrained, and against `cp`.

    python -m benchmarks.merge speed [--shape medium] [--rank 8] [--targets c_attn]

    Everyone is warm: imported, and one merge done. Seconds are of a complete merge, from the adapter's directory to one
    that Transformers loads; memory is the largest resident set of any merge less that after the imports (Linux), so the
    first merge counts, which computes the base's fingerprint, and so do pages of files; how many of those there are at
    a merge's end is reported beside it. The tensors that peftune wrote are compared with PEFT's, bit by bit.
    """
    (adapter,) = setup.adapters(1)
    everyone = [_contestant(setup, name, way, adapter) for name, way in WAYS.items()]
    result = setup.measure("B6", "merge, warm", everyone)
    ours, verified, peft, peft_synced, cp, cp_synced = everyone
    grown, files = ([found[key] / 1e6 for found in ours.rounds if found["grown"] is not None]
                    for key in ("grown", "files"))  # fmt: skip
    different = {} if peft.failure else differing(setup.root / "out-ours", setup.root / "out-peft")
    worst = f"{next(iter(different))} and others, at most {max(different.values()):.1e} off" if different else ""
    count = [] if peft.failure else [len(different)]
    name = f"PEFT {versions().get('peft', '?')}"
    result.rows = [
        compare("B6 peft", "merge", peft, ours, name),
        compare("B6 cp", "merge, time", ours, cp, "cp of the base"),
        compare("B6", "merge", peft_synced, ours, "PEFT, on disk"),
        compare("B6", "merge, time", ours, cp_synced),
        row("B6 memory", "merge, memory", "above imports", grown, "MB"),
        row("B6", "merge, pages of files in it", "above imports", files, "MB"),
        row("B6 tensors", "merge, tensors that differ", "PEFT", count, "tensors", worst or peft.failure),
        compare("B6", "merge and verify", peft, verified, f"{name}, unverified"),
    ]
    return result


def memory(setup: Setup) -> Result:
    """Peak resident memory of a verified merge of a rank-16 adapter on all linear layers, by default into gpt2-xl.

    python -m benchmarks.merge memory [--shape xl] [--dtype float32] [--work DIR]

    The merge is in a process of its own; the peak is the largest resident set (Linux: VmHWM, mapped pages of files
    included). gpt2-xl needs about 13 GB of disk, and 7 GB of memory to make the random base.
    """
    (adapter,) = setup.adapters(1)
    verified = _contestant(setup, "peftune, verified", "verified", adapter, setup.arguments.dtype)
    result = setup.measure("merge", "peak memory of a verified merge", [verified], at_once=False)
    result.rows = [row("merge", "peak of the process", "all", [r["peak"] / 1e6 for r in verified.rounds], "MB")]
    result.notes = [", ".join(f"{key} {value}" for key, value in verified.rounds[-1]["report"].items())]
    return result


def load_worker(job: dict[str, Any], channel: Channel) -> None:
    """One round loads a base held in so many bits; the value is the megabytes that it takes."""
    kind, quantize = job["kind"], None if job["kind"] in DTYPES else job["kind"]
    if quantize is not None:
        loading_options(quantize, "cpu")
        import bitsandbytes.nn  # noqa: F401
    for _ in channel.rounds(precision=kind):
        start = time.perf_counter()
        with largest(lambda: process_memory("RssAnon")) as peak:
            model = load_model(Base(Path(job["base"])), DTYPES.get(kind, DTYPES["bf16"]), quantize=quantize)
        seconds = time.perf_counter() - start
        channel.send(value=footprint(model.requires_grad_(False)).held / 1e6, peak=peak[0] / 1e6, seconds=seconds)


def loading(setup: Setup) -> Result:
    """What a quantised base takes: bytes held, and memory while it is loaded, for each way of holding one.

    python -m benchmarks.merge loading [--shape small]

    The peak is the largest private memory while loading over that before (Linux: RssAnon, so without the pages of the
    mapped checkpoint, which the system takes back). What is not quantised is bf16.
    """
    job = {"base": str(setup.base)}
    everyone = [Contestant(kind, "benchmarks.merge:load_worker", {**job, "kind": kind}, "MB") for kind in PRECISIONS]
    result = setup.measure("loading", "memory of a base", everyone, at_once=False)
    for c in everyone:
        for key, unit in (("peak", "MB"), ("seconds", "s")):
            found = [r[key] for r in c.rounds]
            result.rows.append(row("loading", f"{key} while loading {c.name}", "before", found, unit, c.failure))
    return result


def error(setup: Setup) -> Result:
    """How far a quantised base is from full precision, with and without LoftQ's correction at its start.

    python -m benchmarks.merge error [--base builtin:small] [--ranks 8,16,64]

    Scores the built-in held-out documents with each way of holding a trained base: loss in nats per token, mean KL of
    its predictions from those of float32, and seconds to load it.
    """
    base, ranks = Base(setup.base, setup.base.name), [int(rank) for rank in setup.arguments.ranks.split(",")]
    end = base.tokenizer.eos_token_id
    texts = [d.text for part in ("docs", "code") for d in documents(part, "heldout")[:12]]
    inputs = [torch.tensor([[end, *base.tokenizer(text)["input_ids"]]])[:, :256] for text in texts]

    @torch.no_grad()
    def predictions(model: torch.nn.Module) -> list[torch.Tensor]:
        return [model(ids).logits[0].log_softmax(dim=1) for ids in inputs]

    full, result = predictions(load_model(base)), Result("error", "error of a quantised base", {"base": base.name})
    for kind, rank in [(None, 0), *((kind, rank) for kind in ("int8", "nf4") for rank in (0, *ranks))]:
        start, model = time.perf_counter(), load_model(base, quantize=kind)
        if rank:
            model = inject(model, LoraSection(rank=rank, variant="loftq"), 0, base.weights.tensor).model.eval()
        seconds, found = time.perf_counter() - start, predictions(model)
        nats = [-p[:-1].gather(1, ids[0, 1:, None]).sum() for p, ids in zip(found, inputs, strict=True)]
        kl = [(p.exp() * (p - q)).sum() for p, q in zip(full, found, strict=True)]
        loss = float(sum(nats)) / sum(ids.numel() - 1 for ids in inputs)
        mean_kl = max(0.0, float(sum(kl))) / sum(ids.numel() for ids in inputs)
        name = f"{kind or 'fp32'}{f', LoftQ rank {rank}' if rank else ''}"
        result.notes.append(f"{name}: loss {loss:.4f} nats a token, KL {mean_kl:.2e}, {seconds:.1f} s")
    return result


BENCHMARKS = {"speed": speed, "memory": memory, "loading": loading, "error": error}

if __name__ == "__main__":
    main("merge", BENCHMARKS)
