"""A prompt goes to the adapter under which it is likeliest."""

from __future__ import annotations

import math

import pytest
import torch

from peftune.inference.bank import AdapterBank
from peftune.inference.routing import nats_per_token, route


def test_scores_are_the_gain_over_the_base_in_nats_per_token(bank: AdapterBank) -> None:
    ids = bank.encode("the cat sat on the mat and the dog")
    found = route(bank, ids)
    for name in bank.names:
        base, own = (-bank.logits(torch.tensor([ids]), n)[0, :-1].double().log_softmax(-1) for n in (None, name))
        places = range(len(ids) - 1)
        gain = sum(float(base[i, ids[i + 1]] - own[i, ids[i + 1]]) for i in places) / len(places)
        assert found.scores[name] == pytest.approx(gain, abs=1e-4)
    best = max(found.scores, key=lambda name: found.scores[name])
    assert found.name == (best if found.scores[best] > 0 else None)


def test_the_base_answers_where_no_adapter_reaches_the_threshold(bank: AdapterBank) -> None:
    ids = bank.encode("the dog")
    assert route(bank, ids, threshold=math.inf).name is None
    assert route(bank, ids, threshold=-math.inf).name is not None


def test_a_prompt_of_no_tokens_says_nothing(bank: AdapterBank) -> None:
    assert route(bank, bank.encode("")).name is None


def test_a_text_longer_than_the_context_is_judged_by_its_beginning(bank: AdapterBank) -> None:
    ids = list(range(100, 200))
    assert nats_per_token(bank, ids, ["wide"]) == nats_per_token(bank, ids[:64], ["wide"])
