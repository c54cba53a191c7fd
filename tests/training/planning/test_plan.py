"""What a plan foresees is what a step keeps, and the plan refuses and recommends as training would."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from peftune.cli.main import app
from peftune.cli.plan import size_of
from peftune.config.recipe import Recipe, recipe_from
from peftune.errors import UserError
from peftune.model import lora
from peftune.model.train.forward import train_forward
from peftune.training.optimizer import Gradient
from peftune.training.planning.calibration import seconds_per_block
from peftune.training.planning.plan import Machine, Plan, plan
from peftune.training.planning.trace import LiveBytes, activation_peak, activations

CONFIG = GPT2Config(n_layer=7, n_embd=64, n_head=2, vocab_size=300, n_positions=256)
XL = GPT2Config(n_layer=48, n_embd=1600, n_head=25)


def recipe(*overrides: str) -> Recipe:
    return recipe_from({"base": "gpt2-xl", "data": {"train": "none.txt"}, "run": {"out": "x"}}, list(overrides))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_trace_counts_what_a_real_step_keeps(dtype: torch.dtype, recompute: bool) -> None:
    config = GPT2Config(n_layer=3, n_embd=64, n_head=2, vocab_size=300, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    asked = recipe(f"run.checkpointing={str(recompute).lower()}")
    adapted = lora.inject(GPT2LMHeadModel(config), asked.lora, seed=0)
    for parameter in adapted.model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    forward = train_forward(adapted, dtype, 0.0, 0.0, recompute)
    parameters = list(adapted.trainable().values())
    gradient = Gradient(parameters, [p.shape for p in parameters], torch.device("cpu"))
    adapted.model.train()
    ids = torch.zeros(2, 160, dtype=torch.int64)
    with LiveBytes([*adapted.model.parameters(), *adapted.model.buffers(), gradient.flat, ids]) as live:
        gradient.add(forward(ids, ids, ids, None))
    foreseen = activation_peak(config, asked, dtype, 160, 2, "cpu", sharded=False)
    few = 128  # positions whose logits are made at one time; of the others the trace leaves out their last hidden state
    left_out = (2 * 160 - few) * config.n_embd * 4 * 4
    assert foreseen <= live.peak <= foreseen + left_out


@pytest.mark.parametrize(
    "overrides",
    [(), ("run.checkpointing=true",), ("lora.variant=dora",), ("lora.dropout=0.1",), ("lora.targets=[h.6.mlp.c_fc]",)],
    ids=str,
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_few_layers_and_blocks_say_what_all_keep(overrides: tuple[str, ...], device: Any) -> None:
    asked = recipe(*overrides)
    first, each = activations(CONFIG, asked, torch.float32, 256, device, sharded=False)
    for blocks in (4, 6):
        whole = activation_peak(CONFIG, asked, torch.float32, 256, blocks, device, sharded=False)
        assert first + (blocks - 1) * each == pytest.approx(whole, rel=0.02)


def planned(machine: Machine, *overrides: str) -> Plan:
    return plan(recipe(*overrides), XL, machine)


def gpus(gigabytes: float, count: int) -> Machine:
    return Machine("cuda", int(gigabytes * 1e9), count, here=False)


def test_a_smaller_gpu_recomputes_and_then_packs_the_base() -> None:
    layouts = [planned(gpus(size, 1)).recommended for size in (40, 5, 3.5)]
    found = [(o.layout.quantize, o.layout.checkpointing) for o in layouts if o is not None]
    assert found == [(None, False), (None, True), ("int8", True)]
    assert planned(gpus(1, 1)).recommended is None


def test_every_option_that_fits_is_within_the_memory_and_no_larger_batch_would_be() -> None:
    machine = gpus(24, 1)
    found = planned(machine)
    for option in (o for o in found.options if o.fits):
        assert option.peak <= machine.usable
        fixed = planned(machine, f"batch.micro_size={option.micro_size + 1}", "batch.global_size=4096")
        larger = next(o for o in fixed.options if o.layout == option.layout)
        assert not larger.fits or option.micro_size in (32, 64)  # all of a step, or all that is worth it


def test_what_zero_3_cannot_train_is_refused_with_the_reason() -> None:
    found = planned(gpus(24, 4), "lora.variant=dora")
    reasons = {o.refused for o in found.options if o.layout.way == "zero3" and o.layout.quantize is None}
    assert len(reasons) == 1
    assert "it reads full weights" in reasons.pop()
    assert all(not o.refused for o in found.options if o.layout.way == "ddp" and o.layout.quantize is None)


def test_offloading_takes_the_optimizer_off_the_gpu() -> None:
    found = planned(gpus(24, 4))
    held = {
        o.layout.offload: o.held
        for o in found.options
        if dataclasses.replace(o.layout, offload=False) == dataclasses.replace(found.options[1].layout, offload=False)
    }
    assert held[True] == held[False] - 12 * -(-found.trained // 4)


@pytest.mark.parametrize("override", ["lora.targets=all", "lora.targets=[h.6.mlp.c_fc]", "lora.variant=dora"])
def test_a_block_is_timed(override: str) -> None:
    seconds = seconds_per_block(CONFIG, recipe(override), torch.float32, 64, torch.device("cpu"), seconds=0.0)
    assert 0 < seconds < 60


@pytest.mark.parametrize(("text", "size"), [("24GB", 24e9), ("80GiB", 80 * 2**30), ("0.5 GB", 5e8), ("300MB", 3e8)])
def test_sizes(text: str, size: float) -> None:
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "much", "24TB", "-1GB", "0GB", "1e99GB"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected a size such as 24GB"):
        size_of(text)


def write(path: Path, **values: Any) -> Path:
    path.write_text(json.dumps({"base": "gpt2", "data": {"train": "none.txt"}, "run": {"out": "x"}} | values))
    return path


def test_the_verb_needs_neither_weights_nor_a_network_and_names_the_command(tmp_path: Path) -> None:
    figures = tmp_path / "plan.json"
    where = write(tmp_path / "r.yaml")
    done = CliRunner().invoke(app, ["plan", str(where), "--gpu", "8GB", "--count", "2", "--json", str(figures)])
    assert done.exit_code == 0, done.output
    assert f"take: peftune launch ddp {where} batch.micro_size=" in done.output
    assert "--processes 2" in done.output
    assert json.loads(figures.read_text())["recommended"]["fits"] is True


def test_the_verb_ends_with_an_error_where_nothing_fits(tmp_path: Path) -> None:
    where = write(tmp_path / "r.yaml", base="gpt2-xl")
    done = CliRunner().invoke(app, ["plan", str(where), "--gpu", "1GB"])
    assert isinstance(done.exception, UserError)
    assert "nothing fits: the least, one process with the base in nf4" in str(done.exception)
