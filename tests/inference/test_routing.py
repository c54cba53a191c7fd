"""A prompt goes to the adapter under which it is likeliest."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from peftune.cli.main import run
from peftune.config.recipe import Source
from peftune.data.tokens.store import prepare
from peftune.errors import UserError
from peftune.inference.bank import AdapterBank
from peftune.inference.routing.accuracy import measure_routing, prompts_of
from peftune.inference.routing.route import JUDGED_TOKENS, route


def test_scores_are_the_gain_over_the_base_in_nats_per_token(bank: AdapterBank) -> None:
    ids = bank.encode("the cat sat on the mat and the dog")
    found = route(bank, ids)
    for name in bank.names:
        base, own = (-bank.logits(torch.tensor([ids]), n)[0, :-1].double().log_softmax(-1) for n in (None, name))
        positions = range(len(ids) - 1)
        gain = sum(float(base[i, ids[i + 1]] - own[i, ids[i + 1]]) for i in positions) / len(positions)
        assert found.scores[name] == pytest.approx(gain, abs=1e-4)
    best = max(found.scores, key=lambda name: found.scores[name])
    assert found.margin is not None and found.margin < found.scores[best]
    assert found.name == (best if found.margin > 0 else None)


def test_the_base_answers_where_no_adapter_reaches_the_threshold(bank: AdapterBank) -> None:
    ids = bank.encode("the dog")
    assert route(bank, ids, threshold=math.inf).name is None
    assert route(bank, ids, threshold=-math.inf).name is not None


def test_a_prompt_of_no_tokens_says_nothing(bank: AdapterBank) -> None:
    assert route(bank, bank.encode("")).name is None


def test_of_a_long_prompt_the_end_is_judged(bank: AdapterBank) -> None:
    ids = list(range(100, 250))
    found = route(bank, ids)
    assert found.tokens == JUDGED_TOKENS == 64
    assert found == route(bank, [ids[0], *ids[-64:]]) != route(bank, ids[:65])


def texts(path: Path, lines: list[str]) -> list[Source]:
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return [Source(path=str(path))]


def test_every_prompt_is_counted_where_it_was_sent(
    base_directory: Path,
    adapters: dict[str, Path],
    bank: AdapterBank,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = [f"the cat sat {word} on the log" for word in ("on", "and", "naïve", "東京", "dog")]
    own = {name: adapters[name] for name in ("attention", "wide")}
    data = {"wide": texts(tmp_path / "wide.txt", lines), "base": texts(tmp_path / "base.txt", lines[:2])}
    report = tmp_path / "routing.json"
    results = measure_routing(str(base_directory), data, own, prompt_tokens=4, max_prompts=100)
    options = [f"--adapter={name}={directory}" for name, directory in own.items()]
    options += [f"--data={name}={tmp_path / name}.txt" for name in data]
    options += [f"--base={base_directory}", "--prompt-tokens=4", "--prompts=100", f"--json={report}"]
    assert run(["eval", "--routing", *options]) == 0
    sent = [route(bank, bank.encode(line)[:5], list(own)).name or "base" for line in lines]
    assert results["routing"]["wide"]["to"] == Counter(sent)
    assert results["routing"]["base"]["to"] == Counter(sent[:2])
    written = json.loads(report.read_text())
    assert written == results | {"prompt_tokens": 4, "threshold": 0.0}
    assert written["accuracy"] == (sent.count("wide") + sent[:2].count("base")) / 7
    assert "prompts of" in capsys.readouterr().out


def test_a_domain_without_an_adapter_of_its_name_is_refused(adapters: dict[str, Path], tmp_path: Path) -> None:
    data = {"poems": texts(tmp_path / "poems.txt", ["a"])}
    with pytest.raises(UserError, match="the adapters are wide, head, the domains poems"):
        measure_routing("never opened", data, {name: adapters[name] for name in ("wide", "head")})


def test_a_prompt_is_what_stands_before_the_completion_or_the_first_tokens(
    base_directory: Path, tmp_path: Path
) -> None:
    bank = AdapterBank(str(base_directory), device="cpu")
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "the cat sat", "completion": " on the mat"}\n')
    pairs = [Source(path=str(file), prompt="prompt", completion="completion")]
    text = [Source(path=str(tmp_path / "t.txt"))]
    (tmp_path / "t.txt").write_text("the dog on the log")
    stores = [prepare(s, bank.tokenizer, "test", " ", "auto") for s in (pairs, text)]
    assert prompts_of(stores[0], 2, 9) == [bank.encode("the cat sat")]
    assert prompts_of(stores[1], 2, 9) == [bank.encode("the dog on the log")[:3]]
    assert prompts_of(stores[1], 99, 9) == [bank.encode("the dog on the log")]
