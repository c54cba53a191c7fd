"""Decoding, against Transformers' `generate` and against a plain loop without a cache."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, GPT2LMHeadModel, PreTrainedTokenizerFast

from peftune.adapters.attach import load_with_rows
from peftune.adapters.base_of import read_for
from peftune.errors import CheckFailed, UserError
from peftune.inference.bank import AdapterBank
from peftune.inference.detokenize import decode_plain
from peftune.inference.generate import generate, generate_with_transformers
from peftune.inference.request import context_ids, slide
from peftune.inference.settings import GenerationSettings
from peftune.model.base import Base

GREEDY = GenerationSettings(max_new_tokens=20, temperature=0.0)
# PEFT asks Transformers under a deprecated name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Fresh = Callable[..., GPT2LMHeadModel]
ENDING_SEED = 18  # of a random model that ends one of the prompts below
PROMPTS = ["the cat", "", "naïve café 東京 and then the dog sat on the log, the mat", "x", "the dog sat on the"]


def reference(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, prompt: str, **options: object
) -> tuple[int, ...]:
    """Transformers' own answer, without the end token."""
    context = torch.tensor([context_ids(tokenizer, prompt)])
    end = tokenizer.eos_token_id
    config = GenerationConfig(do_sample=False, eos_token_id=end, pad_token_id=end, **options)
    output = model.generate(input_ids=context, attention_mask=torch.ones_like(context), generation_config=config)
    written = output[0, context.shape[1] :].tolist()
    return tuple(written[: written.index(end)] if end in written else written)


def saved(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> AdapterBank:
    """A bank of a model that a test has made."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return AdapterBank(str(directory), device="cpu")


def without_cache(
    model: GPT2LMHeadModel, window: list[int], steps: int, end: int, penalty: float = 1.0
) -> tuple[int, ...]:
    """The sliding rule word for word: read the window, take the likeliest token, cut when too long."""
    written: list[int] = []
    seen = set(window)
    most = model.config.n_positions
    for _ in range(steps):
        if len(window) > most:
            window = window[-(most - most // 4) :]
        with torch.no_grad():
            logits = model(torch.tensor([window]), use_cache=False).logits[0, -1]
        for token in seen:
            logits[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
        token = int(logits.argmax())
        seen.add(token)
        if token == end:
            break
        written.append(token)
        window = [*window, token]
    return tuple(written)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_is_that_of_transformers(
    bank: AdapterBank, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, prompt: str
) -> None:
    (answer,) = bank.generate([prompt], GREEDY)
    assert answer.ids == reference(model, tokenizer, prompt, max_new_tokens=20)
    assert answer.text == decode_plain(tokenizer, answer.ids)


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_a_repetition_penalty_is_that_of_transformers(
    bank: AdapterBank, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, penalty: float
) -> None:
    answers = bank.generate(PROMPTS, dataclasses.replace(GREEDY, repetition_penalty=penalty))
    for answer in answers:
        expected = reference(model, tokenizer, answer.prompt, max_new_tokens=20, repetition_penalty=penalty)
        assert answer.ids == expected


def test_beams_are_those_of_transformers(
    base: Path, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    answers = generate(PROMPTS, str(base), settings=GenerationSettings(max_new_tokens=12, beams=3))
    assert len(answers) == len(PROMPTS)
    for answer in answers:
        assert answer.ids == reference(model, tokenizer, answer.prompt, max_new_tokens=12, num_beams=3)


@pytest.mark.parametrize("penalty", [0.0, 0.8, 0.9, 2.0, -1.0])
def test_ten_beams_with_a_length_penalty_are_those_of_transformers(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, penalty: float
) -> None:
    prompts = PROMPTS[:2]
    rules = {"length_penalty": penalty, "no_repeat_ngram_size": 4 if penalty > 0 else 2, "min_new_tokens": 3}
    settings = GenerationSettings(max_new_tokens=12, beams=10, num_return_sequences=3, **rules)
    texts: dict[int, str] = {}
    found = generate_with_transformers(model, tokenizer, prompts, settings, texts.__setitem__)
    assert [one.prompt for one in found] == [prompt for prompt in prompts for _ in range(3)]
    assert [one.text for one in found] == [texts.get(n, "") for n in range(6)]
    for prompt, own in zip(prompts, (found[:3], found[3:]), strict=True):
        context = torch.tensor([context_ids(tokenizer, prompt)])
        end = tokenizer.eos_token_id
        expected = model.generate(
            context, attention_mask=torch.ones_like(context), num_beams=10, num_return_sequences=3, max_new_tokens=12,
            do_sample=False, eos_token_id=end, pad_token_id=end, **rules,
        )  # fmt: skip
        ids = [row[: row.index(end)] if end in row else row for row in expected[:, context.shape[1] :].tolist()]
        assert [list(one.ids) for one in own] == ids


def test_a_length_penalty_decides_among_texts_of_unequal_length(
    fresh: Fresh, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The sum of log-probabilities by the number of tokens, the last of them included, to this power."""
    model = fresh(ENDING_SEED)
    lengths = []
    for penalty in (-3.0, 3.0):
        settings = GenerationSettings(max_new_tokens=20, beams=5, length_penalty=penalty)
        lengths.append(sum(len(one.ids) for one in generate_with_transformers(model, tokenizer, PROMPTS, settings)))
    assert lengths[0] < lengths[1]


@pytest.mark.parametrize("size", [1, 2])
def test_runs_of_tokens_that_may_not_come_twice_are_those_of_transformers(
    bank: AdapterBank, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, size: int
) -> None:
    prompts = ["the cat sat on the cat", "x"]
    settings = dataclasses.replace(GREEDY, no_repeat_ngram_size=size)
    free = bank.generate(prompts, GREEDY)
    answers = bank.generate(prompts, settings)
    for answer in answers:
        assert answer.ids == reference(model, tokenizer, answer.prompt, max_new_tokens=20, no_repeat_ngram_size=size)
    assert [one.ids for one in answers] != [one.ids for one in free]
    assert generate_with_transformers(model, tokenizer, prompts, settings) == answers


@pytest.mark.parametrize("beams", [1, 3])
def test_what_the_prompt_holds_may_come_again_once(
    bank: AdapterBank, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, beams: int
) -> None:
    settings = dataclasses.replace(GREEDY, beams=beams, no_repeat_ngram_size=1, repeat_prompt=True)
    prompt = string.printable[:40]
    (found,) = generate_with_transformers(model, tokenizer, [prompt], settings)
    counted = dataclasses.replace(settings, repeat_prompt=False)
    (barred,) = generate_with_transformers(model, tokenizer, [prompt], counted)
    asked = set(context_ids(tokenizer, prompt))
    assert asked & set(found.ids) and not asked & set(barred.ids)
    assert len(set(found.ids)) == len(found.ids) == 20
    if beams == 1:
        assert bank.generate([prompt], settings) == [found]


def test_where_every_token_would_repeat_something_still_comes(bank: AdapterBank) -> None:
    settings = GenerationSettings(max_new_tokens=310, temperature=1.0, seed=1, no_repeat_ngram_size=1, ignore_eos=True)
    (found,) = bank.generate([""], settings)
    assert len(found.ids) == 310 and len(set(found.ids)) == len(bank.tokenizer) - 1


@pytest.mark.parametrize("beams", [1, 3])
def test_a_token_that_the_settings_name_ends_a_text(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, beams: int
) -> None:
    free = dataclasses.replace(GREEDY, beams=beams)
    (whole,) = generate_with_transformers(model, tokenizer, ["the cat"], free)
    at = whole.ids.index(whole.ids[6])
    stops = dataclasses.replace(free, stop_token_ids=(whole.ids[6],))
    (cut,) = generate_with_transformers(model, tokenizer, ["the cat"], stops)
    assert cut.finish_reason == "end" and whole.ids[6] not in cut.ids
    if beams == 1:
        assert cut.ids == whole.ids[:at]
    (longer,) = generate_with_transformers(model, tokenizer, ["the cat"], dataclasses.replace(stops, min_new_tokens=9))
    assert len(longer.ids) >= 9


def test_several_samples_of_a_prompt_have_the_seeds_that_follow(bank: AdapterBank) -> None:
    settings = GenerationSettings(max_new_tokens=8, temperature=1.0, seed=5, num_return_sequences=3)
    shown: dict[int, str] = {}
    found = bank.generate(["the", "x"], settings, None, lambda i, text: shown.update({i: shown.get(i, "") + text}))
    alone = [
        bank.generate([prompt], dataclasses.replace(settings, seed=5 + n, num_return_sequences=1))[0]
        for prompt in ("the", "x")
        for n in range(3)
    ]
    assert found == alone and len({one.text for one in found[:3]}) == 3
    assert [shown.get(n, "") for n in range(6)] == [one.text for one in found]


@pytest.mark.parametrize("values", [{}, {"temperature": 0.0, "presence_penalty": 1.0}, {"temperature": 1.0}])
def test_what_only_sampling_has_is_refused_by_a_search(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, values: dict[str, float]
) -> None:
    with pytest.raises(UserError, match="which a bank does"):
        generate_with_transformers(model, tokenizer, ["the"], GenerationSettings(**values))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_gives_every_prompt_what_it_gets_alone(bank: AdapterBank, temperature: float) -> None:
    # 70 tokens more than fill the window of 64, each row's at another step
    settings = GenerationSettings(max_new_tokens=70, temperature=temperature, seed=7, repetition_penalty=1.1)
    together = bank.generate(PROMPTS, settings)
    assert together == [bank.generate([prompt], settings)[0] for prompt in PROMPTS]


def test_rows_that_end_early_leave_the_others_as_they_are(bank: AdapterBank) -> None:
    settings = GenerationSettings(max_new_tokens=90, temperature=1.0, seed=1, stop=("e", "th"))
    together = bank.generate(PROMPTS, settings)
    assert len({len(answer.ids) for answer in together}) > 2
    assert together == [bank.generate([prompt], settings)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("prompt", ["", "the cat " * 12, "naïve 東京 " * 40])
def test_a_full_window_slides_as_a_plain_loop_without_a_cache_does(
    bank: AdapterBank, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, prompt: str
) -> None:
    settings = GenerationSettings(max_new_tokens=110, temperature=0.0)
    expected = without_cache(model, context_ids(tokenizer, prompt), 110, tokenizer.eos_token_id)
    assert bank.generate([prompt], settings)[0].ids == expected
    assert generate_with_transformers(model, tokenizer, [prompt], settings)[0].ids == expected


def test_windows_of_a_batch_slide_as_each_does_alone_with_a_repetition_penalty(
    bank: AdapterBank, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = GenerationSettings(max_new_tokens=90, temperature=0, repetition_penalty=1.3)
    prompts = ["the cat sat on the mat and the dog sat", "the"]
    for made, prompt in zip(bank.generate(prompts, settings), prompts, strict=True):
        expected = without_cache(model, context_ids(tokenizer, prompt), 90, tokenizer.eos_token_id, penalty=1.3)
        assert made.ids == expected


def test_the_window_keeps_three_quarters_once_it_is_full() -> None:
    ids = list(range(100))
    assert slide(ids[:64], 64) == ids[:64]
    assert slide(ids[:65], 64) == ids[17:65]
    assert slide(ids, 64) == ids[52:]
    assert slide(ids, 1) == [99]
    assert slide(ids, 3) == [97, 98, 99]


def test_a_seed_gives_the_same_text_again_and_another_seed_another(bank: AdapterBank) -> None:
    def text(seed: int | None) -> str:
        settings = GenerationSettings(max_new_tokens=20, temperature=1.5, seed=seed)
        return bank.generate(["the cat"], settings)[0].text

    assert text(1) == text(1) != text(2)
    assert text(None) != text(None)


def test_the_seed_of_an_unseeded_text_gives_it_again(bank: AdapterBank) -> None:
    settings = GenerationSettings(max_new_tokens=20, temperature=1.5)
    first, second = bank.generate(["the cat", "the cat"], settings)
    assert first.text != second.text
    assert bank.generate(["the cat"], dataclasses.replace(settings, seed=second.seed)) == [second]


def test_generation_leaves_the_global_random_state_alone(
    bank: AdapterBank, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = torch.get_rng_state()
    bank.generate(["the"], GenerationSettings(max_new_tokens=5, temperature=1.0))
    generate_with_transformers(model, tokenizer, ["the"], GREEDY)
    assert torch.equal(torch.get_rng_state(), before)


def test_texts_come_as_they_are_generated_and_their_parts_join_to_the_text(bank: AdapterBank) -> None:
    parts: list[tuple[int, str]] = []
    settings = GenerationSettings(max_new_tokens=40, temperature=1.0, seed=3, stop=("e", "ab"))
    answers = bank.generate(PROMPTS, settings, on_text=lambda i, text: parts.append((i, text)))
    for i, answer in enumerate(answers):
        assert "".join(text for row, text in parts if row == i) == answer.text
        assert not any(stop in answer.text for stop in settings.stop)
    assert all(text for _, text in parts)
    assert len(parts) > len(PROMPTS)


@pytest.mark.parametrize("beams", [1, 2])
def test_a_stop_string_across_tokens_ends_the_text_before_it(
    base: Path, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, beams: int
) -> None:
    free = dataclasses.replace(GREEDY, beams=beams)
    (complete,) = generate(["the cat"], str(base), settings=free)
    first, second = (decode_plain(tokenizer, [token]) for token in complete.ids[3:5])
    stop = first[-1:] + second[:1]
    stopping = dataclasses.replace(free, stop=(stop,))
    (cut,) = generate(["the cat"], str(base), settings=stopping)
    assert cut.finish_reason == "stop"
    assert cut.text == complete.text[: complete.text.index(stop)]
    assert cut.ids == complete.ids[: len(cut.ids)]
    assert len(cut.ids) <= 5
    assert generate_with_transformers(model, tokenizer, ["the cat"], stopping) == [cut]


def test_the_end_token_ends_a_text_and_is_not_part_of_it(
    fresh: Fresh, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = fresh(ENDING_SEED)
    answers = saved(model, tokenizer, tmp_path).generate(PROMPTS, GREEDY)
    assert {answer.finish_reason for answer in answers} == {"end", "length"}
    for answer in answers:
        assert answer.ids == reference(model, tokenizer, answer.prompt, max_new_tokens=20)
        assert (len(answer.ids) < 20) == (answer.finish_reason == "end")
    assert generate_with_transformers(model, tokenizer, PROMPTS, GREEDY) == answers


def test_the_length_ends_a_text(bank: AdapterBank) -> None:
    (answer,) = bank.generate(["the cat"], dataclasses.replace(GREEDY, max_new_tokens=1))
    assert (answer.finish_reason, len(answer.ids)) == ("length", 1)


def test_the_context_token_stands_first_even_before_an_empty_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    assert context_ids(tokenizer, "") == [tokenizer.eos_token_id]
    assert context_ids(tokenizer, "the")[0] == tokenizer.eos_token_id


def test_a_special_token_written_in_a_prompt_is_plain_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = context_ids(tokenizer, "<|endoftext|>b")
    assert ids.count(tokenizer.eos_token_id) == 1
    assert decode_plain(tokenizer, ids[1:]) == "<|endoftext|>b"


def test_no_prompts_give_no_texts(
    bank: AdapterBank, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert bank.generate([], GREEDY) == generate_with_transformers(model, tokenizer, [], GREEDY) == []


def test_dropout_is_off_meanwhile_and_on_again_afterwards(fresh: Fresh, tokenizer: PreTrainedTokenizerFast) -> None:
    adapted = get_peft_model(
        fresh(),
        LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.9, init_lora_weights=False),
    )
    adapted.train()
    first, second = (generate_with_transformers(adapted, tokenizer, PROMPTS, GREEDY) for _ in range(2))
    assert first == second
    assert adapted.training
    with pytest.raises(RuntimeError, match="asked to stop"):
        generate_with_transformers(adapted, tokenizer, ["the"], GREEDY, raising)
    assert adapted.training


def raising(index: int, text: str) -> None:
    raise RuntimeError("asked to stop")


def test_a_token_that_the_tokenizer_does_not_know_is_never_chosen(
    fresh: Fresh, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = fresh()
    model.resize_token_embeddings(len(tokenizer) + 64, mean_resizing=False)
    bank = saved(model, tokenizer, tmp_path)
    settings = GenerationSettings(max_new_tokens=200, temperature=5.0, top_p=1.0, seed=0)
    assert max(bank.generate(["the"], settings)[0].ids) < len(tokenizer)
    with torch.no_grad():
        model.transformer.wte.weight[len(tokenizer) :] *= 20  # now the likeliest tokens
    for beams in (1, 2):
        settings = dataclasses.replace(GREEDY, beams=beams)
        for answer in generate_with_transformers(model, tokenizer, PROMPTS, settings):
            assert max(answer.ids, default=0) < len(tokenizer)


def test_a_model_with_non_finite_logits_is_not_believed(
    fresh: Fresh, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = fresh()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(torch.nan)
    with pytest.raises(CheckFailed, match="not finite"):
        saved(model, tokenizer, tmp_path).generate(["the"], GREEDY)
    for beams in (1, 2):
        with pytest.raises(CheckFailed, match="not finite"):
            generate_with_transformers(model, tokenizer, ["the"], dataclasses.replace(GREEDY, beams=beams))


def test_a_tokenizer_of_another_model_is_refused(
    fresh: Fresh, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = fresh()
    model.resize_token_embeddings(50)
    with pytest.raises(UserError, match="tokenizer"):
        saved(model, tokenizer, tmp_path)


def test_beams_beyond_the_window_are_refused(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"prompt 2: .* no sliding window"):
        settings = GenerationSettings(max_new_tokens=60, beams=2)
        generate_with_transformers(model, tokenizer, ["", "the cat sat on the mat"], settings)


@pytest.mark.parametrize("beams", [1, 2])
def test_one_call_loads_an_adapter_and_continues_prompts(
    base_directory: Path, adapters: dict[str, Path], bank: AdapterBank, tokenizer: PreTrainedTokenizerFast, beams: int
) -> None:
    settings = dataclasses.replace(GREEDY, beams=beams)
    made = generate(PROMPTS, str(base_directory), adapters["dora"], settings)
    if beams == 1:
        assert made == bank.generate(PROMPTS, settings, "dora")
    else:
        base = Base(base_directory)
        adapted = load_with_rows(base, *read_for(adapters["dora"], base))
        assert made == generate_with_transformers(adapted, tokenizer, PROMPTS, settings)
