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

from peftune.cli.launcher.configuration import has_engine
from peftune.config.recipe import recipe_from
from peftune.training.run import train

ROOT = Path(__file__).parents[2]
STEP = {
    "training/step.py:_accumulate (tolist)": 1,
    "training/fleet/shared_room.py:accumulate (tolist)": 1,
    "training/distributed/collectives.py:all_reduce_sum (tolist)": 1,
    "training/step.py:steps_together (tolist)": 1,
}
"""Waits of a step, at most: its own sums, those of all ranks, and the norms."""
TALKS = {"all_reduce": 2}
"""Of a step: its sums, and its gradients."""
BY_DEEPSPEED = {
    "training/distributed/zero.py:update (synchronize)": 1,
    "training/distributed/zero.py:update (tensor of numbers)": 1,
    "training/distributed/zero.py:update (_local_scalar_dense)": 2,
}
ZERO_TALKS = {"all_reduce": 3, "all_gather_into_tensor": 1}
ZERO_3_TALKS = {"all_reduce": 5, "reduce_scatter_tensor": 1}
"""Besides it gathers weights, as often as DeepSpeed finds right."""


def launch(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cuda"}
    program = str(Path(__file__).with_name("ranks.py"))
    return subprocess.run(
        [*command, program, str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter_model.safetensors")


def test_ranks_with_a_gpu_each_learn_what_a_cpu_learns(tiny_base: Path, tmp_path: Path) -> None:
    """Steps of two micro-batches a rank, checkpoints, evaluations before and after."""

    def values(name: str, **changed: Any) -> dict[str, Any]:
        run = {"out": str(tmp_path / name), "precision": "fp32", "eval_every": 0, "save_every": 1} | changed
        made = values_over_text(tiny_base, tmp_path) | {"run": run}
        return made | {"optim": {"lr": 1e-2, "steps": 2}, "batch": {"global_size": 4, "micro_size": 1}}

    alone = {"plain": values("plain", checkpointing=True), "bf16": values("bf16", precision="bf16")}
    fleet = {"a": values("a", seed=1), "b": values("b", seed=2) | {"lora": {"rank": 2, "dropout": 0.1}}}
    engines = ("zero1", "zero2", "zero2-offload", "zero3", "zero3-offload") if has_engine() else ()
    jobs: list[Any] = [*([[one], None] for one in alone.values()), [[*fleet.values()], None]]
    jobs += [[[values(name)], f"ds_configs/{name}.json"] for name in engines]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = launch(tmp_path)
    assert done.returncode == 0, done.stderr[-12000:]
    for rank in range(2):
        steps_of = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert [len(steps) for steps in steps_of] == [2] * len(jobs)
        for (_, engine), steps in zip(jobs, steps_of, strict=True):
            waits, talks = STEP, TALKS
            if engine is not None:
                waits, talks = STEP | BY_DEEPSPEED, ZERO_3_TALKS if "zero3" in engine else ZERO_TALKS
            for step in steps:
                gathers = {"all_gather_into_tensor", "broadcast"} if talks is ZERO_3_TALKS else set()
                assert {k: n for k, n in step["collectives"].items() if k not in gathers} == talks, engine
                more = {place: count for place, count in step["waits"].items() if count > waits.get(place, 0)}
                assert not more or "offload" in engine or "zero3" in engine, f"{engine}: {more}"
    on_cpu = alone["plain"]["run"] | {"out": str(tmp_path / "cpu"), "device": "cpu"}
    train(recipe_from(alone["plain"] | {"run": on_cpu}, []))
    wanted = weights(tmp_path / "cpu")
    for name in ("plain", *engines):
        for key, found in weights(tmp_path / name).items():
            # AdamW divides by the root of second moments near zero, where sums in another order show
            torch.testing.assert_close(found, wanted[key], rtol=0, atol=5e-5, msg=lambda m, n=name: f"{n}: {m}")


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
