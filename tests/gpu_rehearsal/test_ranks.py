"""Two ranks with a pretended GPU each: what NCCL would refuse, and how often a step waits and talks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_recipe import values_over_text
from pretended_cuda import PretendedCUDA, WrongDevice
from pretended_nccl import pretend_nccl
from safetensors.torch import load_file

from peftune.config.recipe import recipe_from
from peftune.training.run import train

ROOT = Path(__file__).parents[2]
WAITS = {
    "training/step.py:_accumulate (tolist)": 1,
    "training/fleet/shared_room.py:accumulate (tolist)": 1,
    "training/distributed/collectives.py:all_reduce_sum (tolist)": 1,
    "training/step.py:steps_together (tolist)": 1,
}
"""Of a step, at most: its own sums, those of all ranks, and the norms."""
TALKS = {"all_reduce": 2}
"""Of a step: its sums, and its gradients."""


def launch(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    program = str(Path(__file__).with_name("ranks.py"))
    return subprocess.run(
        [*command, program, str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter_model.safetensors")


def test_ranks_with_a_gpu_each_learn_what_a_cpu_learns(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def values(name: str, **changed: Any) -> dict[str, Any]:
        run = {"out": str(tmp_path / name), "precision": "fp32", "eval_every": 2, "save_every": 2} | changed
        made = values_over_text(tiny_base, tmp_path) | {"run": run}
        return made | {"optim": {"lr": 1e-2, "steps": 4}, "batch": {"global_size": 8, "micro_size": 2}}

    alone = {"plain": values("plain"), "recomputed": values("recomputed", checkpointing=True)}
    fleet = {"a": values("a", seed=1), "b": values("b", seed=2) | {"lora": {"rank": 2, "dropout": 0.1}}}
    half = {"bf16": values("bf16", precision="bf16"), "fp16": values("fp16", precision="fp16")}
    jobs = [*([one] for one in alone.values()), [*fleet.values()], *([one] for one in half.values())]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = launch(tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        for steps in json.loads((tmp_path / f"rank-{rank}.json").read_text()):
            assert len(steps) == 4
            for step in steps:
                assert not step["faults"]
                more = {place: count for place, count in step["waits"].items() if count > WAITS.get(place, 0)}
                assert not more, f"the host waits for the GPU: {more}"
                assert step["collectives"] == TALKS
    for name, one in alone.items():
        run = one["run"] | {"out": str(tmp_path / "cpu"), "device": "cpu", "resume": "never"}
        train(recipe_from(one | {"run": run | {"out": str(tmp_path / f"cpu-{name}")}}, []))
        for key, wanted in weights(tmp_path / f"cpu-{name}").items():
            # AdamW divides by the root of second moments near zero, where sums in another order show
            torch.testing.assert_close(weights(tmp_path / name)[key], wanted, rtol=0, atol=5e-5)


def test_what_nccl_would_refuse_is_found(cuda: PretendedCUDA, monkeypatch: pytest.MonkeyPatch) -> None:
    called = pretend_nccl(monkeypatch, cuda)
    with pytest.raises(WrongDevice, match=r"all_reduce of a tensor on the CPU, \(3,\)"):
        torch.distributed.all_reduce(torch.zeros(3))
    with pytest.raises(WrongDevice, match="broadcast of a tensor with gaps"):
        torch.distributed.broadcast(torch.zeros(3, 4, device="cuda").T, src=0)
    with pytest.raises(WrongDevice, match="cuda:1 is not this process's GPU"):
        torch.zeros(3, device="cuda:1")
    with pytest.raises(WrongDevice, match="begin with backend gloo"):
        torch.distributed.init_process_group(backend="gloo")
    assert called == {"all_reduce": 1, "broadcast": 1} and len(cuda.faults) == 4
