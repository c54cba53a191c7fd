"""The gate: the gradient of every adapter matrix, packed by peftune, against PEFT document by document in float32.

Both start from the same base and the same adapter values (B drawn at random too: at zero, A would have no gradient).
peftune's gradient is what its own step hands to the optimizer. The figure is the largest relative error
|packed - reference| / |reference| (Frobenius norms) over all adapter matrices, in fp32 and in bf16.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Any

import torch

from benchmarks.harness.options import Setup
from benchmarks.harness.report import number
from benchmarks.harness.workers import Channel, Contestant

LIMITS = {"fp32": 1e-5, "bf16": 2e-2}


def worker(job: dict[str, Any], channel: Channel) -> None:
    """One round for both precisions; the value is the larger share of its limit."""
    channel.ready(settings={"blocks": job["recipe"]["batch"]["global_size"]})
    for _ in channel.rounds():
        with redirect_stdout(sys.stderr):
            found = {precision: errors(job, precision) for precision in LIMITS}
        worst = {precision: max(each.values()) for precision, each in found.items()}
        channel.answer(max(worst[p] / LIMITS[p] for p in worst), worst=worst, matrices=found)


def errors(job: dict[str, Any], precision: str) -> dict[str, float]:
    """Relative error of each adapter matrix by name."""
    from benchmarks.harness.ours import TrainingRun

    out = f"run.out={job['recipe']['run']['out']}-{precision}"
    run = TrainingRun(job["recipe"], [*job["overrides"], f"run.precision={precision}", "optim.clip=null", out])
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in run.parameters.items():
            if ".lora_B." in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    values = {name: parameter.detach().cpu().clone() for name, parameter in run.parameters.items()}
    found, expected = run.gradients_of_a_step(), reference(run, values)
    return {n: float((found[n] - expected[n]).norm() / expected[n].norm()) for n in values}


def reference(run: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradient of the mean loss over the same step's tokens through PEFT, a document at a time, float32 on the CPU."""
    from peft import get_peft_model
    from torch.nn import functional as F
    from transformers import GPT2LMHeadModel

    from peftune.model.load import with_dropout
    from peftune.model.lora import peft_config, quiet_peft

    config = with_dropout(run.base.config, 0.0)
    config._attn_implementation = "eager"
    base = GPT2LMHeadModel.from_pretrained(run.base.directory, config=config, dtype=torch.float32)
    with quiet_peft():
        model = get_peft_model(base, peft_config(base, run.recipe.lora)).train()
    parameters = dict(model.named_parameters())
    for name, value in values.items():
        parameters[name].data.copy_(value)
    tokens = 0
    for ids, scored in run.documents_of_first_step():
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        F.cross_entropy(logits[scored[1:]], ids[1:][scored[1:]], reduction="sum").backward()
        tokens += int(scored[1:].sum())
    return {name: parameters[name].grad.double() / tokens for name in values}  # type: ignore[union-attr]


def contestant(setup: Setup) -> Contestant:
    """The comparison on this command's base, documents, adapter and recipe keys."""
    recipe = setup.recipe("gate", batch={"global_size": setup.arguments.gate_blocks})
    job = {"recipe": recipe, "overrides": setup.arguments.ours}
    return Contestant("gradients", "benchmarks.harness.gradients", job, "of the limit", must_run=True)


def passed(setup: Setup) -> dict[str, Any]:
    """The gate: what was found, or SystemExit where a gradient is not what PEFT computes."""
    if not setup.arguments.gate_blocks:
        return {"skipped": "--gate-blocks 0"}
    print("gate: gradients against PEFT, document by document", file=sys.stderr)
    judge = contestant(setup)
    setup.interleave([judge], rounds=1, warmup=0)
    worst = judge.rounds[0]["worst"]
    found = {f"{p} gradients": f"{number(worst[p])} (limit {LIMITS[p]:g})" for p in worst}
    if judge.rounds[0]["value"] > 1:
        raise SystemExit(f"the gate is closed, nothing was timed: {found}")
    return found
