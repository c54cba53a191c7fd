"""What a recipe can ask of a run, and what a run leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from peftune import device
from peftune.config.recipe import Recipe
from peftune.data.batches import Batch
from peftune.errors import CheckFailed, UserError
from peftune.model.base import Base
from peftune.model.load import load_model
from peftune.model.lora import quiet_peft
from peftune.training import optimizer, step
from peftune.training.metrics import read_metrics
from peftune.training.run import train
from peftune.training.step import ForwardFn

Make = Callable[..., Recipe]


def learnt(made: Recipe) -> tuple[list[float], dict[str, torch.Tensor]]:
    train(made)
    out = Path(made.run.out)
    losses = [event["loss"] for event in read_metrics(out / "metrics.jsonl") if event["event"] == "train"]
    return losses, load_file(out / "adapter_model.safetensors")


def test_the_adapter_directory_is_what_the_design_says(recipe: Make, tiny_base: Path) -> None:
    made = recipe("data.validation=0.2", "run.eval_every=2", 'run.samples=["the cat"]')
    delivery = train(made)
    out = Path(made.run.out)
    assert {path.name for path in out.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "peftune.json", "metrics.jsonl", "loss.png", "README.md",
        "checkpoints", ".lock",
    }  # fmt: skip
    provenance = json.loads((out / "peftune.json").read_text())
    assert provenance["recipe"]["optim"]["lr"] == 1e-2 and provenance["step"] == 3
    assert len(provenance["base_fingerprint"]) == 64 and provenance["data_fingerprints"]["train"]
    figures = delivery.metrics["validation"]
    assert figures["adapter"]["loss"] < figures["base"]["loss"]
    assert f"{figures['adapter']['perplexity']:.3f}" in (out / "README.md").read_text()
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    events = read_metrics(out / "metrics.jsonl")
    assert [e["event"] for e in events] == [
        "start",
        "eval",
        "sample",
        "train",
        "memory",
        "train",
        "eval",
        "sample",
        "train",
        "eval",
        "sample",
        "end",
    ]
    assert {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "peak_memory_bytes"} <= events[3].keys()


def test_plain_peft_loads_the_adapter_and_computes_what_was_evaluated(recipe: Make, tiny_base: Path) -> None:
    made = recipe("data.validation=0.2")
    wanted = train(made).metrics["validation"]["adapter"]
    with quiet_peft():
        model = PeftModel.from_pretrained(load_model(Base(tiny_base)), made.run.out)
    from peftune.data.batches import Blocks
    from peftune.inference.evaluation.documents import nats_by_document
    from peftune.model.loss import LossModel
    from peftune.training.inputs import read_inputs

    blocks: Blocks = read_inputs(made).corpus.domains["validation"]
    nats = nats_by_document(LossModel(model), blocks, 4, torch.device("cpu"))[:, 0].sum()
    np.testing.assert_allclose(nats / blocks.tokens(), wanted["loss"], rtol=1e-6)


def test_the_summary_says_where_the_adapter_is_and_what_it_gained(recipe: Make) -> None:
    delivery = train(recipe("data.validation=0.2"))
    last = delivery.summary()
    after = delivery.metrics["validation"]["adapter"]["perplexity"]
    assert last.startswith(f"{delivery.out}: adapter of step 3") and last.endswith(f"→ {after:,.2f}")


def test_provenance_tells_whether_the_data_were_conversations(recipe: Make, corpus: Path, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on a mat"}]
    chats.write_text(f"{json.dumps({'messages': turns})}\n" * 8)
    for train_on, chat in ((f"[{chats}]", True), (f"[{chats}, {corpus}]", False)):
        made = recipe(f"data.train={train_on}", "optim.steps=1", f"run.out={tmp_path / str(chat)}")
        train(made)
        assert json.loads((Path(made.run.out) / "peftune.json").read_text())["chat"] is chat


def test_running_a_finished_recipe_again_does_nothing(recipe: Make) -> None:
    made = recipe("data.validation=0.2")
    first = train(made)
    before = (Path(made.run.out) / "metrics.jsonl").read_bytes()
    assert train(made) == first
    assert (Path(made.run.out) / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "pissa"])
def test_every_variant_learns_and_resumes(
    recipe: Make, tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (f"lora.variant={variant}", "optim.steps=4", "optim.lr=3e-3")
    losses, whole = learnt(recipe(*settings, f"run.out={tmp_path / 'a'}"))
    assert losses[-1] < losses[0]
    made = recipe(*settings, f"run.out={tmp_path / 'b'}")
    taken = iter([step.train_step] * 2)
    monkeypatch.setattr("peftune.training.run.train_step", lambda *given: next(taken, _stop)(*given))
    with pytest.raises(Exception, match="the same command"):
        train(made)
    monkeypatch.undo()
    resumed_losses, resumed = learnt(made)
    assert resumed_losses == losses
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def _stop(*_: object) -> object:
    raise step.StopNow


def test_checkpointing_changes_memory_not_the_adapter(recipe: Make, tmp_path: Path) -> None:
    losses, plain = learnt(recipe(f"run.out={tmp_path / 'a'}"))
    again, saved = learnt(recipe("run.checkpointing=true", f"run.out={tmp_path / 'b'}"))
    np.testing.assert_allclose(again, losses, rtol=1e-6)
    assert losses[-1] < losses[0]
    for name in plain:
        torch.testing.assert_close(saved[name], plain[name], rtol=1e-4, atol=1e-5)


def test_neftune_is_noise_in_training_only(recipe: Make, tmp_path: Path) -> None:
    quiet = train(recipe("data.validation=0.2", f"run.out={tmp_path / 'a'}"))
    add_neftune_noise = train(recipe("data.validation=0.2", "optim.neftune=10", f"run.out={tmp_path / 'b'}"))
    assert quiet.metrics["validation"]["base"] == add_neftune_noise.metrics["validation"]["base"]
    assert quiet.metrics["validation"]["adapter"] != add_neftune_noise.metrics["validation"]["adapter"]


def test_early_stopping_delivers_the_best_step(recipe: Make) -> None:
    made = recipe("data.validation=0.3", "optim.lr=0.3", "optim.steps=200", "run.eval_every=2", "run.early_stopping=3")
    delivery = train(made)
    events = [e for e in read_metrics(Path(made.run.out) / "metrics.jsonl") if e["event"] == "eval"]
    best = min(events, key=lambda e: e["loss"])
    assert events[-1]["step"] < 200 and delivery.step == best["step"] == events[-4]["step"]
    if delivery.step:
        assert delivery.metrics["validation"]["adapter"]["loss"] == best["loss"]


def test_extra_modules_are_trained_whole(recipe: Make) -> None:
    _, tensors = learnt(recipe("lora.modules_to_save=[ln_f]", "lora.layers=[1]"))
    names = {name for name in tensors if ".lora_" not in name}
    assert names == {"base_model.model.transformer.ln_f.weight", "base_model.model.transformer.ln_f.bias"}
    assert not any(".h.0." in name for name in tensors)


def test_base_dropout_is_honoured_and_off_by_default(recipe: Make, tmp_path: Path) -> None:
    first = learnt(recipe(f"run.out={tmp_path / 'a'}"))[0]
    second = learnt(recipe("run.base_dropout=0.3", f"run.out={tmp_path / 'b'}"))[0]
    assert first[0] != second[0]


def test_bf16_follows_fp32(recipe: Make, tmp_path: Path) -> None:
    exact = learnt(recipe(f"run.out={tmp_path / 'a'}", "optim.steps=6"))[0]
    rounded = learnt(recipe(f"run.out={tmp_path / 'b'}", "optim.steps=6", "run.precision=bf16"))[0]
    np.testing.assert_allclose(rounded, exact, rtol=5e-3)


def test_memory_running_out_halves_the_micro_batch_and_changes_nothing(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, wanted = learnt(recipe(f"run.out={tmp_path / 'a'}"))
    score = ForwardFn.__call__

    def fits_two(forward: ForwardFn, batch: Batch) -> torch.Tensor:
        if len(batch.ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(forward, batch)

    monkeypatch.setattr(ForwardFn, "__call__", fits_two)
    again, found = learnt(recipe("batch.micro_size=auto", f"run.out={tmp_path / 'b'}"))
    np.testing.assert_allclose(again, losses, rtol=1e-6)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-4)
    made = recipe("batch.micro_size=auto", "data.validation=0.3", f"run.out={tmp_path / 'd'}")
    assert train(made).metrics["validation"]["base"]["tokens"] > 0
    with pytest.raises(UserError, match="out of memory with micro_size 8"):
        train(recipe(f"run.out={tmp_path / 'c'}"))


def test_a_rate_that_explodes_is_stopped_before_the_update(recipe: Make) -> None:
    with pytest.raises(CheckFailed, match=r"step \d+: loss .*adapter was not updated"):
        train(recipe("optim.lr=1e9", "optim.steps=20", "optim.clip=null", "lora.alpha=1e4"))


def test_lora_plus_gives_b_its_own_rate() -> None:
    from peftune.config.recipe import OptimSection

    parameters = {f"x.lora_{m}.default.weight": torch.nn.Parameter(torch.ones(2, 2)) for m in "AB"}
    built = optimizer.build_adamw(parameters, OptimSection(lr=1e-3, lr_b_ratio=16, weight_decay=0.1), fused=False)
    optimizer.set_rate(built, 5e-4)
    assert [g["lr"] for g in built.param_groups] == [5e-4, 8e-3]


@pytest.mark.parametrize(("schedule", "last"), [("linear", 0.1), ("cosine", 0.0245), ("constant", 1.0)])
def test_schedules_rise_then_fall_to_zero_after_the_last_step(schedule: str, last: float) -> None:
    from peftune.config.recipe import OptimSection

    optim = OptimSection(lr=1.0, schedule=schedule, warmup=2)  # type: ignore[arg-type]
    rates = [optimizer.lr_at(number, 12, optim) for number in range(12)]
    np.testing.assert_allclose(rates[:3], [1 / 3, 2 / 3, 1.0])
    np.testing.assert_allclose(rates[-1], last, rtol=1e-2)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert optimizer.warmup_steps(100, 0.03) == 3 and optimizer.warmup_steps(1, 0.5) == 0


def test_fp16_on_a_cpu_and_absent_trackers_are_refused_before_training(recipe: Make) -> None:
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        device.choose_precision("fp16", on_gpu=False)
    with pytest.raises(UserError, match=r"mlflow.* not installed"):
        train(recipe("run.track=[mlflow]"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.block_size=128", "only 64 positions"),
        ("base=./nowhere", "no such directory"),
        ("base=builtin:large", "no such built-in base"),
        ("lora.targets=[q_proj]", "no linear or embedding module 'q_proj'"),
        ("run.out=/dev/null/x", "cannot be written"),
    ],
)
def test_input_that_cannot_work_is_one_clear_error(recipe: Make, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        train(recipe(override))
    assert "\n" not in str(error.value)


def test_named_evaluation_domains_are_scored_apart(recipe: Make, corpus: Path) -> None:
    delivery = train(recipe(f"data.validation={{first: {corpus}, second: [{corpus}]}}"))
    assert delivery.metrics["first"] == delivery.metrics["second"] and set(delivery.metrics) == {"first", "second"}
