"""`data.chat: eos-turns` from training to everything that asks: evaluation, REPL, server, merge, Transformers, GGUF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, GPT2LMHeadModel

from peftune.adapters.edit.combine import combine
from peftune.adapters.gguf.write_gguf import export_gguf
from peftune.adapters.merge.merge import merge
from peftune.cli.writing.repl import ReplSession
from peftune.config.recipe import recipe_from
from peftune.errors import UserError
from peftune.inference.bank import AdapterBank
from peftune.inference.perplexity import evaluate
from peftune.inference.settings import GenerationSettings
from peftune.model.base import open_base
from peftune.model.lora import quiet_peft
from peftune.training.run import train

TALK = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on the mat"}]
ASKED = [*TALK, {"role": "user", "content": "the dog<|endoftext|>"}]


@pytest.fixture(scope="module")
def made(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter of each template, and the merges of both."""
    root = tmp_path_factory.mktemp("chats")
    (root / "talk.jsonl").write_text((json.dumps({"messages": TALK}) + "\n") * 8)
    for chat in ("eos-turns", "plain"):
        train(
            recipe_from(
                {
                    "base": str(tiny_base),
                    "data": {"train": str(root / "talk.jsonl"), "validation": 0, "chat": chat},
                    "optim": {"steps": 2, "lr": 0.02}, "batch": {"global_size": 1},
                    "run": {"out": str(root / chat), "precision": "fp32", "eval_every": 0, "save_every": 0},
                },
                [],
            )
        )  # fmt: skip
        merge(root / chat, root / f"{chat}-merged", texts=["the cat"])
    names = ("eos-turns", "plain", "eos-turns-merged", "plain-merged", "talk.jsonl")
    return {name: root / name for name in names}


def turns(base: Path, messages: list[dict[str, str]]) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    return [
        id
        for message in messages
        for id in (*tokenizer.encode(message["content"], split_special_tokens=True), tokenizer.eos_token_id)
    ]


def test_evaluation_scores_the_turns_of_the_training(made: dict[str, Path], tiny_base: Path) -> None:
    figures = evaluate(str(tiny_base), {"talk": made["talk.jsonl"]}, {"one": made["eos-turns"]})
    ids = torch.tensor([turns(tiny_base, TALK)])
    said = ids[0].tolist().index(int(ids[0, -1])) + 1  # behind the end of the first turn
    with quiet_peft(), torch.no_grad():
        model = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tiny_base), made["eos-turns"]).eval()
        nats = -model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[said - 1 :]
    assert figures["rows"]["one"]["talk"]["loss"] == pytest.approx(float(nats.mean()), rel=1e-5)
    both = {"one": made["eos-turns"], "two": made["plain"]}
    with pytest.raises(UserError, match=r"one: trained with data.chat: eos-turns, others not"):
        evaluate(str(tiny_base), {"talk": made["talk.jsonl"]}, both)
    merged = evaluate(str(made["eos-turns-merged"]), {"talk": made["talk.jsonl"]})
    assert merged["rows"]["base"]["talk"]["loss"] == pytest.approx(float(nats.mean()), rel=1e-5)


def test_a_server_asks_by_the_template_of_each_adapter(made: dict[str, Path], tiny_base: Path, start: Any) -> None:
    adapters = {name: made[name] for name in ("eos-turns", "plain")}
    ids = turns(tiny_base, ASKED)
    asked = {"messages": ASKED, "max_tokens": 3, "temperature": 0, "return_token_ids": True, "logprobs": True}
    with start(adapters, base=str(tiny_base)) as server:
        answer = server.post("/v1/chat/completions", model="eos-turns", prompt_logprobs=0, **asked).json()
        assert answer["usage"]["prompt_tokens"] == len(ids) and len(answer["prompt_logprobs"]) == len(ids)
        assert answer["prompt_logprobs"][0] is None and all(answer["prompt_logprobs"][1:])
        with quiet_peft(), torch.no_grad():
            model = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tiny_base), made["eos-turns"]).eval()
            wanted = model(torch.tensor([ids])).logits[0, -1].argmax()
        assert answer["choices"][0]["token_ids"][0] == int(wanted)
        assert server.post("/tokenize", model="eos-turns", messages=ASKED).json()["tokens"] == ids
        plain = server.post("/tokenize", model="plain", messages=ASKED).json()["tokens"]
        rendered = "User: the cat\n\nAssistant: sat on the mat\n\nUser: the dog<|endoftext|>\n\nAssistant:"
        assert plain == server.bank.encode(rendered)[1:]
        refused = server.post("/v1/chat/completions", model="auto", **asked)
        assert refused.status_code == 400 and "different data.chat" in refused.text
        refused = server.post("/v1/chat/completions", model="base", **asked)
        assert refused.status_code == 400 and "was not trained on chat" in refused.text
        long = server.post("/v1/chat/completions", model="eos-turns", messages=[*ASKED * 9], max_tokens=3)
        assert long.status_code == 400 and "context token" not in long.text


def test_a_merge_carries_its_template_for_us_and_for_transformers(
    made: dict[str, Path], tiny_base: Path, start: Any
) -> None:
    talk = [message | {"content": message["content"].replace("<|endoftext|>", "")} for message in ASKED]
    for chat in ("eos-turns", "plain"):
        directory = made[f"{chat}-merged"]
        rendered = AutoTokenizer.from_pretrained(directory).apply_chat_template(
            talk, add_generation_prompt=True, return_dict=False
        )
        asked = {"messages": talk, "max_tokens": 4, "temperature": 0, "return_token_ids": True, "model": "base"}
        with start({}, base=str(directory)) as server:
            merged = server.post("/v1/chat/completions", **asked).json()
        with start({"one": made[chat]}, base=str(tiny_base)) as server:
            answer = server.post("/v1/chat/completions", **(asked | {"model": "one"})).json()
        assert merged["choices"] == answer["choices"]
        with torch.no_grad():
            logits = GPT2LMHeadModel.from_pretrained(directory)(torch.tensor([rendered])).logits[0, -1]
        assert merged["choices"][0]["token_ids"][0] == int(logits.argmax())
        if chat == "eos-turns":
            assert rendered == turns(tiny_base, talk)


@pytest.mark.parametrize("chat", ["eos-turns", "plain"])
def test_the_repl_talks_by_it_and_gguf_holds_it(
    chat: str, made: dict[str, Path], tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = AdapterBank(str(tiny_base), device="cpu")
    bank.add("one", made[chat])
    session = ReplSession(bank, "one", GenerationSettings(max_new_tokens=4, temperature=0.0))
    session.answer("the cat")
    if chat == "eos-turns":
        ids = turns(tiny_base, session.messages[:1])
        assert session.messages[1]["content"] == bank.generate([ids], session.settings, "one")[0].text
    pytest.importorskip("gguf")
    from gguf import GGUFReader

    merged = made[f"{chat}-merged"]
    export_gguf(open_base(str(merged)), tmp_path / "out")
    fields = GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == (merged / "chat_template.jinja").read_text()
    assert fields["tokenizer.ggml.add_bos_token"].contents() is (chat == "plain")
    modelfile = (tmp_path / "out" / "Modelfile").read_text()
    if chat == "eos-turns":
        assert '"""{{ range .Messages }}{{ .Content }}<|endoftext|>{{ end }}"""' in modelfile
    else:
        assert modelfile.count('PARAMETER stop """\n\n') >= 3 and modelfile.count("Assistant:") == 2


def test_a_combination_of_chats_is_a_chat(made: dict[str, Path], tiny_base: Path, tmp_path: Path) -> None:
    bank = AdapterBank(str(tiny_base), device="cpu")
    combine([made["eos-turns"], made["eos-turns"]], [0.5, 0.5], tmp_path / "same")
    combine([made["eos-turns"], made["plain"]], [0.5, 0.5], tmp_path / "mixed")
    for name, chat in (("same", "eos-turns"), ("mixed", None)):
        assert bank.add(name, tmp_path / name).chat == chat


def test_eos_turns_do_not_go_with_parsed_special_tokens() -> None:
    values = {"base": "gpt2", "data": {"train": "a.jsonl", "chat": "eos-turns", "special_tokens": "parse"}}
    with pytest.raises(UserError, match="chat eos-turns goes with special_tokens text"):
        recipe_from({**values, "run": {"out": "out"}}, [])
