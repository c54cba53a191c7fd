"""A prompt goes to the adapter under which it is likeliest."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from peftune.cli.main import run
from peftune.config.data_section import Source
from peftune.data.tokens.store import prepare
from peftune.errors import UserError
from peftune.inference.bank import AdapterBank
from peftune.inference.routing.accuracy import measure_routing, prompts_of
from peftune.inference.routing.route import JUDGED_TOKENS, _margin, route


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


def test_the_margin_is_the_mean_gain_less_two_standard_errors() -> None:
    assert _margin([]) is None
    assert _margin([3.0]) == pytest.approx(3 - 2 * 2)  # of one token nothing is known but the usual deviation
    many = [1.0, 3.0] * 5000
    assert _margin(many) == pytest.approx(2 - 2 * 1 / 100, abs=1e-3)
    assert _margin([0.5] * 4) < 0 < _margin([0.5] * 400)  # type: ignore[operator]


def test_one_token_is_never_enough(bank: AdapterBank) -> None:
    """The token after the context tells how documents begin; each adapter here finds some of them far likelier."""
    for token in range(0, 300, 30):
        found = route(bank, [bank.end, token], threshold=-1e9)
        assert (found.name, found.margin) == (None, None)
        assert max(found.scores.values()) != 0


def test_an_adapter_whose_numbers_are_not_finite_is_left_out(base_directory: Path, adapters: dict[str, Path]) -> None:
    own = AdapterBank(str(base_directory), device="cpu")
    for name in ("attention", "wide"):
        own.add(name, adapters[name])
    lora = own.get("wide").variant.lora
    assert lora is not None
    next(iter(lora.factors.values()))[1].fill_(torch.nan)
    ids = own.encode("the cat sat on the mat")
    assert route(own, ids, threshold=None) == route(own, ids, ["attention"], threshold=None)


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
    assert results["errors"] == {
        "false_accept": sum(name != "base" for name in sent[:2]) / 2,
        "false_reject": sent.count("base") / 5,
    }
    assert written["accuracy"] == (sent.count("wide") + sent[:2].count("base")) / 7
    out = capsys.readouterr().out
    assert "prompts of" in out
    assert f"threshold 0: {results['errors']['false_accept']:.1%} of the prompts of no domain go to an adapter" in out
    calibrated = results["calibrated"]
    again = measure_routing(str(base_directory), data, own, 4, 100, calibrated["threshold"])
    assert again["errors"] == {key: calibrated[key] for key in ("false_accept", "false_reject")}
    assert max(again["errors"].values()) <= max(results["errors"].values())


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
