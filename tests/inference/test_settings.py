"""Settings are valid or refused with every reason at once."""

from __future__ import annotations

import math
from typing import Any

import pytest

from peftune.errors import UserError
from peftune.inference.settings import GenerationSettings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("beams", 0),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", math.nan),
        ("min_new_tokens", -1),
        ("min_new_tokens", 129),
        ("presence_penalty", math.nan),
        ("frequency_penalty", math.inf),
        ("seed", -1),
        ("seed", 2**63),
        ("length_penalty", math.nan),
        ("no_repeat_ngram_size", -1),
        ("num_return_sequences", 0),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{field} is {value}, expected"):
        GenerationSettings(**{field: value})


def test_every_problem_is_in_the_one_message() -> None:
    with pytest.raises(UserError) as caught:
        GenerationSettings(max_new_tokens=0, temperature=-1, top_p=2, beams=0, stop=("",))
    message = str(caught.value)
    assert all(word in message for word in ("max_new_tokens", "temperature", "top_p", "beams", "stop string"))
    assert "\n" not in message


SAMPLED: list[dict[str, Any]] = [
    {"temperature": 0.8}, {"top_k": 5}, {"min_p": 0.1}, {"presence_penalty": 1.0}, {"frequency_penalty": -1.0},
    {"logit_bias": ((1, 1.0),)},
]  # fmt: skip


@pytest.mark.parametrize("bias", [((1, math.inf),), ((1, 1.0), (1, 2.0))])
def test_a_bias_is_finite_and_given_once(bias: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(UserError, match="logit_bias"):
        GenerationSettings(logit_bias=bias)


@pytest.mark.parametrize("sampling", SAMPLED)
def test_beams_do_not_sample(sampling: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="beam search does not sample"):
        GenerationSettings(beams=2, **sampling)


def test_the_default_temperature_samples_unless_there_are_beams() -> None:
    assert GenerationSettings().sampling_temperature == 0.8
    assert GenerationSettings(beams=2).sampling_temperature == 0
    assert GenerationSettings(temperature=0).sampling_temperature == 0


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"length_penalty": 0.8}, "only beam search"),
        ({"beams": 2, "num_return_sequences": 3}, "with beams 2"),
        ({"temperature": 0, "num_return_sequences": 2}, "all would be equal"),
    ],
)
def test_what_needs_beams_or_samples_is_refused_without(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        GenerationSettings(**values)
