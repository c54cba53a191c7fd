"""B5: the gradient of every adapter matrix, packed by peftune, against PEFT document by document in float32.

    python -m benchmarks.gradients [--shape small] [--gate-blocks 4]

Both start from the same base and the same adapter values (B drawn at random too: at zero, A would have no gradient).
peftune's gradient is what its own step hands to the optimizer. The figure is the largest relative error
|packed - reference| / |reference| (Frobenius norms) over all adapter matrices, in fp32 and in bf16. It is also the gate
of the training targets: they time nothing before it is passed.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from contextlib import redirect_stdout
from typing import Any

from benchmarks.measure import Result, Row, Spread, finish, number
from benchmarks.options import Setup, add_training, parse, parser, prepared
from benchmarks.rounds import Channel, Contestant, interleave

LIMITS = {"fp32": 1e-5, "bf16": 2e-2}


def serve(job: dict[str, Any], channel: Channel) -> None:
    """One round for both precisions; the value is the larger share of its limit."""
    channel.ready(settings={"blocks": job["recipe"]["batch"]["global_size"]})
    for _ in channel.rounds():
        with redirect_stdout(sys.stderr):
            found = {precision: errors(job, precision) for precision in job["precisions"]}
        worst = {precision: max(each.values()) for precision, each in found.items()}
        channel.answer(max(worst[p] / LIMITS[p] for p in worst), worst=worst, matrices=found)


def errors(job: dict[str, Any], precision: str) -> dict[str, float]:
    """Relative error of each adapter matrix by name."""
    import torch

    from benchmarks.ours import Steps, begin
    from peftune.config.recipe import recipe_from

    out = f"run.out={job['recipe']['run']['out']}-{precision}"
    recipe = recipe_from(job["recipe"], [*job["overrides"], f"run.precision={precision}", "optim.clip=null", out])
    session = begin(recipe)
    generator = torch.Generator().manual_seed(7)
    values = {}
    for name, parameter in session.adapted.trainable().items():
        if ".lora_B." in name:
            with torch.no_grad():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        values[name] = parameter.detach().cpu().clone()
    caught: dict[str, torch.Tensor] = {}

    def catch(gradient: Any, divisor: float, rate: float) -> float:
        caught.update({n: v.cpu().double() / divisor for n, v in zip(values, gradient.views, strict=True)})
        return 0.0

    session.engine.update = catch  # type: ignore[method-assign]  # the step ends where the optimizer would begin
    Steps(session).step()
    expected = reference(session, values)
    return {n: float((caught[n] - expected[n]).norm() / expected[n].norm()) for n in values}


def reference(session: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Gradient of the mean loss over the same step's tokens through PEFT, a document at a time, float32 on the CPU."""
    import torch
    from peft import get_peft_model
    from torch.nn import functional as F
    from transformers import GPT2LMHeadModel

    from peftune.data.sampler import blocks_of_step
    from peftune.model.base import with_dropout
    from peftune.model.lora import peft_config, quiet_peft

    source = session.source
    config = with_dropout(source.config, 0.0)
    config._attn_implementation = "eager"
    base = GPT2LMHeadModel.from_pretrained(source.directory, config=config, dtype=torch.float32)
    with quiet_peft():
        model = get_peft_model(base, peft_config(base, session.recipe.lora)).train()
    parameters = dict(model.named_parameters())
    for name, value in values.items():
        parameters[name].data.copy_(value)
    train, recipe = source.corpus.train, session.recipe
    tokens = 0
    for block in blocks_of_step(0, len(train), recipe.batch.global_size, recipe.run.seed):
        for span in train.packing.spans(int(block)):
            document = int(train.documents[train.packing.example[span]])
            start, stop = int(train.packing.start[span]), int(train.packing.stop[span])
            ids, scored = (torch.from_numpy(part.copy()) for part in train.store.window(document, start, stop))
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            loss = F.cross_entropy(logits[scored[1:]], ids[1:][scored[1:]], reduction="sum")
            torch.autograd.backward(loss)
            tokens += int(scored[1:].sum())
    summed = {name: parameters[name].grad for name in values}
    return {name: gradient.double() / tokens for name, gradient in summed.items() if gradient is not None}


def contestant(setup: Setup, precisions: tuple[str, ...] = ("fp32", "bf16")) -> Contestant:
    """The comparison on this command's base, documents, adapter and recipe keys."""
    recipe = setup.recipe(batch={"global_size": setup.arguments.gate_blocks})
    recipe["run"]["out"] = str(setup.root / "gate")
    job = {"recipe": recipe, "overrides": setup.arguments.ours, "precisions": precisions}
    return Contestant("gradients", "benchmarks.gradients", job, "of the limit", must_run=True)


def passed(setup: Setup) -> dict[str, Any]:
    """The gate: what was found, or SystemExit where a gradient is not what PEFT computes."""
    if not setup.arguments.gate_blocks:
        return {"skipped": "--gate-blocks 0"}
    print("gate: gradients against PEFT, document by document", file=sys.stderr)
    judge = contestant(setup)
    interleave([judge], 1, 0, setup.environment())
    worst = judge.rounds[0]["worst"]
    told = {f"{p} gradients": f"{number(worst[p])} (limit {LIMITS[p]:g})" for p in worst}
    if judge.rounds[0]["value"] > 1:
        raise SystemExit(f"the gate is closed, nothing was timed: {told}")
    return told


def rows(worst: dict[str, float]) -> list[Row]:
    """The table's lines."""
    return [
        Row(
            "B5",
            f"gradients in {p}, worst matrix",
            "PEFT fp32, per document",
            Spread(e, e, e),
            LIMITS[p],
            "at most",
            "rel.",
        )
        for p, e in worst.items()
    ]


def run(arguments: Namespace) -> Result:
    """Compare once; there is nothing random in it."""
    with prepared(arguments) as setup:
        judge = contestant(setup)
        interleave([judge], 1, 0, setup.environment())
        result = Result("B5", "gradients, packed against document by document", setup.told())
        result.add([judge])
        result.rows = rows(judge.rounds[0]["worst"])
        return result


def main() -> None:
    """Compare and tell."""
    made = parser(__doc__)
    add_training(made, "", documents=60, gate_blocks=4)
    arguments = parse(made)
    finish(run(arguments), arguments.json)


if __name__ == "__main__":
    main()
