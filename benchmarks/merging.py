"""B6: folding an adapter into its base, against PEFT's merge_and_unload + save_pretrained, and against a plain `cp`.

    python -m benchmarks.merging [--shape medium] [--rank 8] [--targets c_attn]

Everyone is warm: imported, and one merge done. Seconds are of a whole merge, from the adapter's directory to one that
Transformers loads; memory is the largest resident set of any merge less that after the imports (Linux), so the first
merge counts, which computes the base's fingerprint, and so do pages of files; how many of those there are at a merge's
end is told beside it. The tensors that peftune wrote are compared with PEFT's, bit by bit.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks.machine import versions
from benchmarks.measure import Result, Row, Sense, Spread, finish, ratio, spread
from benchmarks.memory import MemoryGrowth
from benchmarks.options import add_adapter, parse, parser, prepared, targets_of
from benchmarks.rounds import Channel, Contestant, interleave
from benchmarks.shapes import PRESETS

PEFT, PEFT_KEPT, CP, CP_KEPT = "PEFT", "PEFT, on disk", "cp", "cp, on disk"
WAYS = {
    "peftune": "ours", "peftune, verified": "verified",
    PEFT: "peft", PEFT_KEPT: "peft-kept", CP: "cp", CP_KEPT: "cp-kept",
}  # fmt: skip
"""«On disk» waits until the disk has it, as peftune does: a directory appears whole even if power fails."""


def serve(job: dict[str, Any], channel: Channel) -> None:
    """One round is one merge into a new directory; the value is its seconds."""
    base, adapter, out = Path(job["base"]), Path(job["adapter"]), Path(job["out"])
    way, _, kept = job["way"].partition("-")
    merge = {"ours": _ours, "verified": _ours, "peft": _peft, "cp": _cp}[way](way)
    growth = MemoryGrowth()
    channel.ready(settings={"way": job["way"], "dtype": "float32"})
    for _ in channel.rounds():
        shutil.rmtree(out, ignore_errors=True)
        growth.before_first_step()
        start = time.perf_counter()
        with redirect_stdout(sys.stderr):
            merge(base, adapter, out)
        for file in out.glob("*.safetensors") if kept else []:
            with file.open("r+b") as opened:
                os.fsync(opened.fileno())
        channel.answer(time.perf_counter() - start, grown=growth.grown(), files=growth.files())


def _ours(way: str) -> Any:
    from transformers import GenerationConfig, GPT2LMHeadModel  # noqa: F401  # imported when a merge first needs them

    from peftune.adapters.merge.merge import merge

    return lambda base, adapter, out: merge(adapter, out, base=str(base), verify=way == "verified")


def _peft(_: str) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def merge(base: Path, adapter: Path, out: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
        AutoTokenizer.from_pretrained(base).save_pretrained(out)

    return merge


def _cp(_: str) -> Any:
    return lambda base, adapter, out: subprocess.run(["cp", "-r", str(base), str(out)], check=True)


def differing(ours: Path, other: Path) -> dict[str, float]:
    """Tensors that are not bit for bit the same in two merged directories, and how far apart at most (inf: absent)."""

    from peftune.model.base import Base

    a, b = Base(ours).weights, Base(other).weights
    found = {name: math.inf for name in set(a.names()) ^ set(b.names())}
    for name in sorted(set(a.names()) & set(b.names())):
        apart = float((a.tensor(name) - b.tensor(name)).abs().max())
        found |= {name: apart} if apart else {}
    return found


def run(arguments: Namespace) -> Result:
    """Adapter, rounds, comparison, rows."""
    from benchmarks.merge_memory import make_adapters

    with prepared(arguments) as setup:
        shape, targets = arguments.shape.config(), targets_of(arguments.targets)
        (adapter,) = make_adapters(setup.root, shape, arguments.rank, targets, 1)
        everyone = {}
        for name, way in WAYS.items():
            job = {"way": way, "base": str(setup.base), "adapter": str(adapter), "out": str(setup.root / f"out-{way}")}
            everyone[name] = Contestant(name, "benchmarks.merging", job, "s", must_run=name.startswith("peftune"))
        interleave(list(everyone.values()), arguments.rounds, arguments.warmup, setup.environment())
        result = Result(
            "B6", "merge, warm", {**setup.told(), "adapter": f"rank {arguments.rank} on {arguments.targets}"}
        )
        result.add(list(everyone.values()))
        different = None if everyone[PEFT].failure else differing(setup.root / "out-ours", setup.root / "out-peft")
    result.rows = _rows(everyone, different)
    return result


def _rows(everyone: dict[str, Contestant], different: dict[str, float] | None) -> list[Row]:
    ours, verified, peft, peft_kept, cp, cp_kept = everyone.values()
    grown = [found["grown"] / 1e6 for found in ours.rounds if found["grown"] is not None]
    files = [found["files"] / 1e6 for found in ours.rounds if found["grown"] is not None]
    count = None if different is None else Spread(len(different), len(different), len(different))
    told = f"{next(iter(different))} and others, at most {max(different.values()):.1e} apart" if different else ""
    told_only: Sense = "information"
    peft_version = versions().get("peft", "?")
    return [
        Row("B6", "merge", f"PEFT {peft_version}", ratio(peft, ours), 6, "at least", reason=peft.failure or ""),
        Row("B6", "merge, time", "cp of the base", ratio(ours, cp), 1.15, "at most", reason=cp.failure or ""),
        Row("B6", "merge", PEFT_KEPT, ratio(peft_kept, ours), 0, told_only, reason=peft_kept.failure or ""),
        Row("B6", "merge, time", CP_KEPT, ratio(ours, cp_kept), 0, told_only, reason=cp_kept.failure or ""),
        Row("B6", "merge, memory", "above imports", spread(grown) if grown else None, 64, "at most", "MB"),
        Row("B6", "merge, pages of files in it", "above imports", spread(files) if files else None, 0, told_only, "MB"),
        Row("B6", "merge, tensors that differ", "PEFT", count, 0, "at most", "tensors", told or peft.failure or ""),
        Row("B6", "merge and verify", f"PEFT {peft_version}, unverified", ratio(peft, verified), 0, "information"),
    ]


def main() -> None:
    """Measure and tell."""
    made = parser(__doc__, shape=PRESETS["medium"])
    add_adapter(made)
    arguments = parse(made)
    finish(run(arguments), arguments.json)


if __name__ == "__main__":
    main()
