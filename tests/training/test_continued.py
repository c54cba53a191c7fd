"""Going on from an adapter (`run.init`) is what PEFT's trainable adapter learns, and a chain that can be followed."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from peftune.cli import main
from peftune.config.recipe import Recipe, load_recipe
from peftune.data.batches import blocks_of_step
from peftune.errors import CheckFailed, UserError
from peftune.model.base import Base
from peftune.model.load import load_model
from peftune.model.lora import quiet_peft
from peftune.model.loss import LossModel
from peftune.training.inputs import read_inputs
from peftune.training.optimizer import build_adamw
from peftune.training.run import train

Make = Callable[..., Recipe]
Cut = Callable[[Recipe], Path]
BARE = ("lora={}",)  # a recipe that leaves the adapter to run.init


def with_peft(base: Path, out: Path, **settings: Any) -> Path:
    """A plain PEFT adapter of random values."""
    torch.manual_seed(1)
    with quiet_peft(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": ["attn.c_attn"]}
        model = get_peft_model(GPT2LMHeadModel.from_pretrained(base), LoraConfig(**values | settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(str(out))
    return out


def trained_by_peft(made: Recipe, adapter: Path) -> dict[str, torch.Tensor]:
    """What AdamW makes of `PeftModel.from_pretrained(…, is_trainable=True)` on the run's blocks."""
    inputs = read_inputs(made)
    with quiet_peft():
        model = PeftModel.from_pretrained(load_model(inputs.base), adapter, is_trainable=True)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, blocks, loss_model = (
        build_adamw(parameters, made.optim, fused=False),
        inputs.corpus.train,
        LossModel(model),
    )
    for step in range(inputs.total_steps):
        chosen = blocks_of_step(step, len(blocks), made.batch.global_size, made.run.seed)
        for batch in blocks.batches(chosen, 8):
            (
                loss_model(batch.ids, batch.positions, batch.targets, batch.segments) / blocks.tokens_of(chosen)
            ).backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), made.optim.clip or 1e9)
        optimizer.step()
        optimizer.zero_grad()
    with quiet_peft():
        learnt: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return learnt


def off(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Relative distance over all elements."""
    assert found.keys() == wanted.keys()
    squares = sum(float((found[n].double() - wanted[n].double()).square().sum()) for n in wanted)
    return float((squares / sum(float(t.double().square().sum()) for t in wanted.values())) ** 0.5)


def weights(out: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(out) / "adapter_model.safetensors")


def written(out: str | Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((Path(out) / "peftune.json").read_text())
    return values


@pytest.fixture
def first(recipe: Make, tmp_path: Path) -> Path:
    """An adapter of ours."""
    train(recipe(f"run.out={tmp_path}/first", "data.validation=0.2"))
    return tmp_path / "first"


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ranks": {
        "target_modules": ["c_attn", "c_fc", "c_proj"],
        "rank_pattern": {"c_fc": 6},
        "alpha_pattern": {"c_fc": 3},
    },
    "pattern": {"target_modules": r".*\.h\.1\..*c_fc", "use_rslora": True, "lora_dropout": 0.5},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True, "target_modules": ["c_fc"]},  # of keys it would have no gradient, only rounding
    "whole": {"modules_to_save": ["ln_f"], "layers_to_transform": [1]},
    "head": {"target_modules": ["attn.c_attn", "lm_head"]},
}


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_what_pefts_trainable_adapter_learns(
    recipe: Make, tiny_base: Path, tmp_path: Path, kind: str
) -> None:
    adapter = with_peft(tiny_base, tmp_path / "peft", **KINDS[kind])
    made = recipe(*BARE, "lora.dropout=0", f"run.init={adapter}", "optim.lr=1e-3")
    train(made)
    found = weights(made.run.out)
    assert off(found, trained_by_peft(made, adapter)) < 1e-6
    before = {name: t for name, t in weights(adapter).items() if name in found}
    assert off(found, before) > 1e-3, "nothing was learnt"


def test_more_epochs_with_adamws_moments_are_one_longer_run(
    recipe: Make, tmp_path: Path, train_without_delivery: Cut
) -> None:
    """Steps over all blocks: no order of samples tells a second run from the rest of a first."""
    whole = ("batch.global_size=1000",)
    train(recipe(*whole, "optim.steps=6", f"run.out={tmp_path}/six"))
    train(recipe(*whole, f"run.out={tmp_path}/three"))
    again = (*whole, *BARE, f"run.init={tmp_path}/three")
    train(recipe(*again, f"run.out={tmp_path}/with", "run.init_optimizer=true"))
    train(recipe(*again, f"run.out={tmp_path}/anew"))
    assert off(weights(tmp_path / "with"), weights(tmp_path / "six")) < 1e-6  # other orders of a sum
    assert off(weights(tmp_path / "anew"), weights(tmp_path / "six")) > 1e-3
    cut = recipe(*again, f"run.out={tmp_path}/cut", "run.init_optimizer=true", "run.save_every=2")
    shutil.rmtree(train_without_delivery(cut) / "checkpoints" / "step-3")
    train(cut)
    assert off(weights(tmp_path / "cut"), weights(tmp_path / "with")) == 0.0
    train(recipe(*whole, *BARE, f"run.init={tmp_path}/with", "run.init_optimizer=true", f"run.out={tmp_path}/nine"))
    state = json.loads((tmp_path / "nine" / "checkpoints" / "step-3" / "state.json").read_text())
    assert state["earlier_updates"] == 6


def test_moments_that_are_not_there_are_not_made_up(recipe: Make, first: Path, tiny_base: Path, tmp_path: Path) -> None:
    asked = (*BARE, "run.init_optimizer=true")
    with pytest.raises(UserError, match="there is no checkpoint of the step that the adapter was delivered from"):
        train(recipe(*asked, f"run.init={with_peft(tiny_base, tmp_path / 'peft')}"))
    train(recipe("lora.variant=pissa", f"run.out={tmp_path}/pissa"))
    with pytest.raises(UserError, match="delivered in another form"):
        train(recipe(*asked, f"run.init={tmp_path}/pissa"))
    shutil.rmtree(first / "checkpoints")
    with pytest.raises(UserError, match="there is no checkpoint"):
        train(recipe(*asked, f"run.init={first}"))
    with pytest.raises(UserError, match=r"run\.init_optimizer takes AdamW's moments of the adapter in run\.init"):
        recipe("run.init_optimizer=true")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lora.rank=8", r"lora\.rank is 8, it has 4"),
        ("lora.alpha=9", r"lora\.alpha is 9.*it has 8"),
        ("lora.variant=dora", r"lora\.variant is dora, it has lora"),
        ("lora.targets=attention", r"lora\.targets is attention, it has all"),
        ("lora.targets=query-value", r"lora\.targets is query-value, it has all"),
        ("lora.layers=[1]", r"lora\.layers is \[1\], it has None"),
        ("lora.modules_to_save=[ln_f]", r"lora\.modules_to_save is \['ln_f'\], it has \[\]"),
        ("data.new_tokens=[<|name|>]", r"data\.new_tokens is \['<\|name\|>'\], it has \[\]"),
    ],
)
def test_another_adapter_than_the_recipes_is_refused_with_both_values(
    recipe: Make, first: Path, override: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        train(recipe(*BARE, f"run.init={first}", override))


def test_what_a_recipe_says_in_other_words_is_the_same(recipe: Make, first: Path) -> None:
    names = "[c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj]"
    made = recipe(f"run.init={first}", f"lora.targets={names}", "lora.layers=[0, 1]", "lora.dropout=0.25")
    lora = read_inputs(made).recipe.lora
    assert (lora.rank, lora.targets, lora.layers, lora.dropout) == (4, "all", None, 0.25)


def test_a_dry_run_prints_the_adapter_that_the_run_goes_on_with(
    recipe: Make, first: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = recipe("lora={}", f"run.init={first}", f"run.out={tmp_path}/second")
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(made.model_dump(mode="json", exclude_unset=True)))
    assert main.run(["train", str(path), "--dry-run"]) == 0
    path.write_text(out := capfd.readouterr().out)
    assert yaml.safe_load(out)["lora"]["rank"] == 4 and "# 4,096 trainable parameters" in out
    assert train(load_recipe(path)).step == 3


def test_a_plan_is_of_the_adapter_that_the_run_goes_on_with(
    recipe: Make, tiny_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = with_peft(tiny_base, tmp_path / "peft", r=2, lora_alpha=2)
    made = recipe(*BARE, f"run.init={adapter}", f"run.out={tmp_path}/second")
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(made.model_dump(mode="json", exclude_unset=True)))
    assert main.run(["plan", str(path), "--no-time"]) == 0
    trained = sum(tensor.numel() for tensor in weights(adapter).values())
    assert f"{tiny_base}: {trained:,} elements to train" in capfd.readouterr().out


def test_the_chain_is_recorded_and_told(
    recipe: Make, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in first.rglob("*") if path.is_file()}
    train(recipe(*BARE, f"run.init={first}", f"run.out={tmp_path}/second", "data.validation=0.2"))
    made = recipe(*BARE, f"run.init={tmp_path}/second", "data.validation=0.2", f"run.out={tmp_path}/third")
    delivery = train(made)
    from peftune.adapters.directory import read_adapter

    chain = written(made.run.out)["init"]
    second = read_adapter(tmp_path / "second")
    assert [entry["adapter"] for entry in chain] == ["second", "first"]
    known = [bytes.fromhex(written(out)["training_documents"]) for out in (first, made.run.out)]
    assert {known[0][i : i + 8] for i in range(0, len(known[0]), 8)} <= {
        known[1][i : i + 8] for i in range(0, len(known[1]), 8)
    }  # what the first learnt is still known
    assert chain[0]["adapter_fingerprint"] == second.fingerprint and chain[0]["step"] == 3
    assert all(entry["base_fingerprint"] == written(first)["base_fingerprint"] for entry in chain)
    # the figures at the start are those of the adapter, not of the base
    rows = delivery.metrics["validation"]
    assert rows["init"]["loss"] == pytest.approx(
        written(tmp_path / "second")["metrics"]["validation"]["adapter"]["loss"]
    )
    assert rows.keys() == {"init", "adapter"}
    card = (tmp_path / "third" / "README.md").read_text()
    assert f"went on from the adapter `second` ({second.fingerprint[:12]}, step 3), and that from `first`" in card
    assert "perplexity, at the start" in card and "perplexity, base" not in card
    assert f"going on from {tmp_path}/second ({second.fingerprint[:12]}), AdamW begins anew" in capsys.readouterr().err
    assert before == {
        path: hashlib.sha256(path.read_bytes()).hexdigest() for path in first.rglob("*") if path.is_file()
    }
    from peftune.cli.main import run

    assert run(["adapters", "show", made.run.out]) == 0
    assert f"training went on from second ({second.fingerprint[:12]}, step 3)" in capsys.readouterr().out


def test_a_cut_run_goes_on_and_notices_another_adapter(
    recipe: Make, first: Path, tmp_path: Path, train_without_delivery: Cut
) -> None:
    made = recipe(*BARE, f"run.init={first}", "run.save_every=2")
    train(recipe(*BARE, f"run.init={first}", f"run.out={tmp_path}/through"))
    shutil.rmtree(train_without_delivery(made) / "checkpoints" / "step-3")
    moved = first.rename(tmp_path / "moved")  # where it lies does not matter, what it holds does
    train(recipe(*BARE, f"run.init={moved}", "run.save_every=2"))
    assert off(weights(made.run.out), weights(tmp_path / "through")) == 0.0
    with pytest.raises(UserError, match="fingerprint of init was"):
        train(recipe(*BARE, f"run.init={tmp_path}/through", "run.save_every=2"))
    with pytest.raises(UserError, match=r"fingerprint of init was .*, is not there"):
        train(recipe(f"run.out={made.run.out}"))


def test_the_adapter_itself_is_not_overwritten(recipe: Make, first: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(first)
    for out in (first, tmp_path / "link"):
        with pytest.raises(UserError, match=r"run\.out is run\.init .* which is not overwritten"):
            train(recipe(*BARE, f"run.init={first}", f"run.out={out}"))


def test_what_cannot_be_gone_on_from_is_refused(
    recipe: Make, first: Path, base_directory: Path, tiny_base: Path, tmp_path: Path
) -> None:
    refused = {
        with_peft(tiny_base, tmp_path / "pissa", init_lora_weights="pissa"): "it changes the base itself",
        with_peft(tiny_base, tmp_path / "biases", bias="all"): "it changes the base itself",
        with_peft(tiny_base, tmp_path / "rows", trainable_token_indices=[3, 5]): "name them as data.new_tokens",
        tmp_path / "none": "No such file or directory",
        tiny_base: "it is a complete model",
        first / "checkpoints" / "step-3": "it is a checkpoint; take the directory of its run",
    }
    for adapter, reason in refused.items():
        with pytest.raises(UserError, match=reason):
            train(recipe(*BARE, f"run.init={adapter}"))
    with pytest.raises(UserError, match=r"was trained on .* but .* has other"):
        train(recipe(*BARE, f"run.init={first}", f"base={base_directory}"))
    file = first / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises((UserError, CheckFailed), match="SHA-256"):
        train(recipe(*BARE, f"run.init={first}"))


@pytest.mark.parametrize("variant", ["pissa", "dora", "loftq"])
def test_a_variant_goes_on_as_it_was_delivered(recipe: Make, tmp_path: Path, variant: str) -> None:
    quantize = "nf4" if variant == "loftq" else "null"
    if variant == "loftq":
        pytest.importorskip("bitsandbytes")
    train(recipe(f"lora.variant={variant}", f"quantize={quantize}", f"run.out={tmp_path}/first", "data.validation=0.2"))
    made = recipe(*BARE, f"run.init={tmp_path}/first", f"quantize={quantize}", "data.validation=0.2")
    begun = train(made).metrics["validation"]["init"]["loss"]
    ended = written(tmp_path / "first")["metrics"]["validation"]["adapter"]["loss"]
    assert begun == pytest.approx(ended, rel=1e-5) or variant == "loftq"
    assert written(made.run.out)["recipe"]["lora"] | {} == {
        **written(made.run.out)["recipe"]["lora"],
        "variant": "dora" if variant == "dora" else "lora", "rank": 4 if variant == "dora" else 8,
    }  # fmt: skip


def test_rows_of_new_tokens_go_on(recipe: Make, tmp_path: Path) -> None:
    tokens = 'data.new_tokens=["on a", "<|name|>"]'
    train(recipe(tokens, f"run.out={tmp_path}/first", "data.validation=0.2"))
    made = recipe(*BARE, f"run.init={tmp_path}/first", "data.validation=0.2", "run.init_optimizer=true")
    begun = train(made).metrics["validation"]["init"]["loss"]
    assert begun == pytest.approx(written(tmp_path / "first")["metrics"]["validation"]["adapter"]["loss"], rel=1e-6)
    assert written(made.run.out)["recipe"]["data"]["new_tokens"] == ["on a", "<|name|>"]
    assert (Path(made.run.out) / "tokenizer.json").exists()


def test_queries_and_values_stay_alone(recipe: Make, tmp_path: Path) -> None:
    train(recipe("lora.targets=query-value", "lora.variant=rslora", f"run.out={tmp_path}/first"))
    made = recipe(*BARE, f"run.init={tmp_path}/first", "lora.rank=4", "lora.alpha=8")
    train(made)
    assert written(made.run.out)["recipe"]["lora"]["targets"] == "query-value"
    settings = [
        json.loads((Path(out) / "adapter_config.json").read_text()) for out in (made.run.out, tmp_path / "first")
    ]
    assert settings[0]["r"] == 8 and settings[0]["lora_alpha"] == pytest.approx(settings[1]["lora_alpha"], rel=1e-11)
    for name, b in weights(made.run.out).items():
        assert "lora_B" not in name or not (b[:32, 4:].any() or b[32:64].any() or b[64:, :4].any())
    with pytest.raises(UserError, match=r"lora.targets is \['c_attn'\], it has query-value"):
        train(recipe(*BARE, f"run.init={tmp_path}/first", "lora.targets=[c_attn]"))


def test_an_adapter_given_as_base_leads_to_run_init(recipe: Make, first: Path, tiny_base: Path) -> None:
    with pytest.raises(
        UserError, match=f"is an adapter, made for {tiny_base}; to go on from it: base={tiny_base} run.init={first}"
    ):
        train(recipe(f"base={first}"))


def test_training_on_a_merge_tells_what_it_stands_on(
    recipe: Make, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peftune.adapters.directory import read_adapter
    from peftune.cli.main import run

    assert run(["merge", str(first), "--out", str(tmp_path / "merged")]) == 0
    made = recipe(f"base={tmp_path}/merged", f"run.out={tmp_path}/second")
    train(made)
    print_of_first = read_adapter(first).fingerprint
    said = capsys.readouterr().err
    assert f"{tmp_path}/merged is a merge of first ({print_of_first[:12]}) into" in said
    assert "the new adapter is relative to that merged model" in said
    assert [entry["adapter_fingerprint"] for entry in written(made.run.out)["base_merged"]] == [print_of_first]
    assert f"Its base is a merge of first ({print_of_first[:12]})" in (tmp_path / "second" / "README.md").read_text()
    assert run(["merge", str(tmp_path / "second"), "--out", str(tmp_path / "twice")]) == 0
    assert f"is a merge of first ({print_of_first[:12]})" in capsys.readouterr().out
    chain = Base(tmp_path / "twice").merged
    assert [entry["adapter"] for entry in chain] == ["second", "first"]
    merge_json = tmp_path / "merged" / "merge.json"  # of a release that did not list them
    values = json.loads(merge_json.read_text())
    del values["merged"]
    merge_json.write_text(json.dumps(values))
    assert [entry["adapter_fingerprint"] for entry in Base(tmp_path / "merged").merged] == [print_of_first]
