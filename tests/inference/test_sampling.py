"""The choice of the next token, against Transformers' own processors."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from peftune.inference.sampling.next_token import (
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    next_tokens,
    scale_by_temperature,
)
from peftune.inference.sampling.penalties import LogitAdjuster, penalise_presence, penalise_repetition
from peftune.inference.settings import GenerationSettings

NO_IDS = torch.zeros(5, 0, dtype=torch.long)


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(5, 200, generator=torch.Generator().manual_seed(1)) * 3


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for _ in range(count)]


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 2.5])
def test_temperature_is_that_of_transformers(logits: torch.Tensor, temperature: float) -> None:
    assert torch.equal(scale_by_temperature(logits, temperature), TemperatureLogitsWarper(temperature)(NO_IDS, logits))


@pytest.mark.parametrize("k", [1, 2, 50, 199, 200, 500])
def test_top_k_is_that_of_transformers(logits: torch.Tensor, k: int) -> None:
    assert torch.equal(keep_top_k(logits, k), TopKLogitsWarper(k)(NO_IDS, logits))


def test_top_k_zero_keeps_everything(logits: torch.Tensor) -> None:
    assert torch.equal(keep_top_k(logits, 0), logits)


def test_top_k_keeps_ties_with_the_last_one() -> None:
    tied = torch.tensor([[1.0, 2.0, 2.0, 0.0]])
    assert torch.equal(keep_top_k(tied, 1), TopKLogitsWarper(1)(NO_IDS, tied))


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_is_that_of_transformers(logits: torch.Tensor, p: float) -> None:
    assert torch.equal(keep_top_p(logits, p), TopPLogitsWarper(p)(NO_IDS, logits))


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_top_p_of_a_large_vocabulary_is_that_of_transformers(spread: float) -> None:
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(3)) * spread
    assert torch.equal(keep_top_p(logits, 0.9), TopPLogitsWarper(0.9)(NO_IDS, logits))


def test_top_p_one_keeps_even_what_is_nearly_impossible() -> None:
    steep = torch.tensor([[100.0, 0.0, -100.0]])
    assert torch.equal(keep_top_p(steep, 1.0), steep)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 10.0])
def test_repetition_penalty_is_that_of_transformers(logits: torch.Tensor, penalty: float) -> None:
    ids = torch.randint(200, (5, 30), generator=torch.Generator().manual_seed(2))
    seen = torch.zeros(5, 200, dtype=torch.bool).scatter(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    assert torch.equal(penalise_repetition(logits, seen, penalty), expected)


def test_draw_follows_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2, 0.0]).log().expand(20_000, 4)
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = draw(logits, uniforms).bincount(minlength=4) / 20_000
    assert torch.allclose(share, torch.tensor([0.5, 0.3, 0.2, 0.0]), atol=0.01)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_draw_never_takes_an_impossible_token(uniform: float) -> None:
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 2.0, -torch.inf]])
    assert draw(logits, torch.tensor([uniform], dtype=torch.float64)).item() in (1, 3)


def test_a_row_draws_the_same_whatever_else_is_in_the_batch(logits: torch.Tensor) -> None:
    together = next_tokens(logits, generators(5), temperature=1.5, top_k=40, top_p=0.95)
    alone = [next_tokens(row[None], generators(1), temperature=1.5, top_k=40, top_p=0.95).item() for row in logits]
    assert together.tolist() == alone


@pytest.mark.parametrize("temperature", [0.0, 1e-30])
def test_a_cold_choice_is_the_likeliest_token(logits: torch.Tensor, temperature: float) -> None:
    assert torch.equal(next_tokens(logits, generators(5), temperature=temperature), logits.argmax(-1))


def test_the_filters_together_are_those_of_transformers(logits: torch.Tensor) -> None:
    warped = logits
    for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(20), TopPLogitsWarper(0.8)):
        warped = warper(NO_IDS, warped)
    possible = {(row, token) for row, token in torch.isfinite(warped).nonzero().tolist()}
    drawn = set()
    for seed in range(300):
        tokens = next_tokens(logits, generators(5, seed), temperature=0.7, top_k=20, top_p=0.8)
        drawn |= set(enumerate(tokens.tolist()))
    assert drawn <= possible
    assert len(drawn) > 0.6 * len(possible)


@pytest.mark.parametrize("min_p", [0.0, 1e-4, 0.05, 0.5, 1.0])
def test_min_p_is_that_of_transformers(logits: torch.Tensor, min_p: float) -> None:
    assert torch.equal(keep_min_p(logits, min_p), MinPLogitsWarper(min_p)(NO_IDS, logits))


def test_min_p_filters_before_top_p_sees_the_rest(logits: torch.Tensor) -> None:
    warped = TopPLogitsWarper(0.6)(NO_IDS, MinPLogitsWarper(0.2)(NO_IDS, logits))
    possible = {(row, token) for row, token in torch.isfinite(warped).nonzero().tolist()}
    drawn = set()
    for seed in range(200):
        drawn |= set(enumerate(next_tokens(logits, generators(5, seed), 1.0, top_p=0.6, min_p=0.2).tolist()))
    assert drawn == possible


def test_presence_and_frequency_penalty_are_openais(logits: torch.Tensor) -> None:
    """mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, in float64, one token after the other."""
    counts = torch.randint(4, (200,), generator=torch.Generator().manual_seed(4)).float()
    expected = [
        mu - count * 0.7 - float(count > 0) * -0.4
        for mu, count in zip(logits[0].tolist(), counts.tolist(), strict=True)
    ]
    found = penalise_presence(logits[0], counts, presence=-0.4, frequency=0.7)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_text_is_adjusted_as_it_grows_as_vllm_would(logits: torch.Tensor) -> None:
    """Bias, repetition (prompt and text), frequency and presence (text alone), forbidden ends: a plain loop."""
    settings = GenerationSettings(
        min_new_tokens=3, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=-0.25,
        logit_bias=((7, 3.0), (8, -100.0)), stop_token_ids=(9,),
    )  # fmt: skip
    prompt, written, end = [7, 11, 11], [11, 12, 12, 12, 8], 0
    adjuster = LogitAdjuster(settings, prompt, end)
    for length in range(len(written) + 1):
        expected = logits[0].double().tolist()
        for token, bias in settings.logit_bias:
            expected[token] += bias
        for token in {*prompt, *written[:length]}:
            expected[token] *= 1.4 if expected[token] < 0 else 1 / 1.4
        for token in written[:length]:
            expected[token] += 0.25
        for token in set(written[:length]):
            expected[token] -= 0.5
        for token in (end, 9) if length < 3 else ():
            expected[token] = -float("inf")
        assert adjuster.is_needed
        assert adjuster.adjust(logits[0]).tolist() == pytest.approx(expected, abs=1e-5)
        if length < len(written):
            adjuster.add(written[length])


def test_a_bias_is_that_of_transformers(logits: torch.Tensor) -> None:
    settings = GenerationSettings(logit_bias=((3, 2.5), (4, -7.0)))
    expected = SequenceBiasLogitsProcessor([[[3], 2.5], [[4], -7.0]])(torch.zeros(5, 1, dtype=torch.long), logits)
    assert torch.equal(LogitAdjuster(settings, (), 0).adjust(logits[0]), expected[0])


def test_without_a_setting_that_changes_logits_nothing_is_computed() -> None:
    assert not LogitAdjuster(GenerationSettings(), (1, 2), 0).is_needed
    late = LogitAdjuster(GenerationSettings(min_new_tokens=1), (), 0)
    assert late.is_needed
    late.add(5)
    assert not late.is_needed
