"""What the server answers, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2 as httpx
import openai
import pytest
from openai import AsyncOpenAI

from peftune.inference.settings import GenerationSettings

PROMPTS = ["def main(", "import os\n", "class Reader:\n    def read(self, size=-1):\n        ", "naïve 東京 "]
NAMES = [f"a{number}" for number in range(8)]


def greedy(server: Any, name: str, prompt: str, most: int) -> str:
    settings = GenerationSettings(max_new_tokens=most, temperature=0)
    (alone,) = server.bank.generate([prompt], settings, [name], slots=1)
    return str(alone.text)


def test_two_hundred_requests_at_once_over_eight_adapters_get_their_solo_answers(server: Any) -> None:
    pairs = [(name, PROMPTS[number % len(PROMPTS)]) for number in range(25) for name in NAMES]
    alone = {pair: greedy(server, *pair, 8) for pair in sorted(set(pairs))}

    async def ask_all() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=60) as client:

            async def ask(name: str, prompt: str) -> str:
                answer = await client.completions.create(model=name, prompt=prompt, max_tokens=8, temperature=0)
                assert answer.model == name
                return answer.choices[0].text

            return await asyncio.gather(*(ask(*pair) for pair in pairs))

    assert len(set(alone.values())) > 20  # adapters do differ
    assert asyncio.run(ask_all()) == [alone[pair] for pair in pairs]


@pytest.mark.parametrize("more", [{}, {"echo": True}, {"logprobs": 2}, {"echo": True, "logprobs": 0}], ids=str)
def test_a_stream_joins_to_the_whole(server: Any, more: dict[str, Any]) -> None:
    asked = {
        "model": "a2", "prompt": PROMPTS[3], "max_tokens": 12, "seed": 5, "n": 2, "stop": [")"],
        "extra_body": {"return_token_ids": True, "top_k": 40, "repetition_penalty": 1.1},
    } | more  # fmt: skip
    whole = server.client.completions.create(**asked)
    usage, parts = None, {0: [], 1: []}  # type: ignore[var-annotated]
    for event in server.client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = event.usage or usage
        for choice in event.choices:
            parts[choice.index].append(choice)
    assert usage == whole.usage
    for choice in whole.choices:
        told = parts[choice.index]
        assert "".join(part.text for part in told) == choice.text
        assert [part.finish_reason for part in told] == [None] * (len(told) - 1) + [choice.finish_reason]
        assert [token for part in told for token in part.token_ids] == choice.token_ids
        assert told[0].prompt_token_ids == choice.prompt_token_ids == server.bank.encode(PROMPTS[3])[1:]
        if "logprobs" in more:
            for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                joined = [value for part in told for value in getattr(part.logprobs, key)]
                assert joined == getattr(choice.logprobs, key)


def test_logprobs_of_an_echoed_prompt_are_those_of_the_model(server: Any) -> None:
    prompt, name = "naïve 東京 x = 1", "a3"
    ids = server.bank.encode(prompt)
    import torch

    nats = server.bank.logits(torch.tensor([ids]), [name])[0].log_softmax(-1)
    expected = [float(row[token]) for row, token in zip(nats, ids[1:], strict=False)]
    answer = server.client.completions.create(model=name, prompt=prompt, max_tokens=0, echo=True, logprobs=3)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, answer.usage.completion_tokens) == (prompt, "length", 0)
    assert answer.usage.prompt_tokens == len(ids) - 1
    assert choice.logprobs.token_logprobs == pytest.approx(expected, abs=1e-4)
    spelled = b"".join(
        bytes.fromhex(token[6:].replace("\\x", "")) if token.startswith("bytes:") else token.encode()
        for token in choice.logprobs.tokens
    )
    assert spelled.decode() == prompt
    whole = [
        (t, at) for t, at in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True) if t[:2] != "by"
    ]
    assert len(whole) > 4 and all(prompt[at:].startswith(token) for token, at in whole)
    for row, token, top in zip(nats, choice.logprobs.tokens, choice.logprobs.top_logprobs, strict=False):
        assert sorted(top.values(), reverse=True)[:3] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        assert token in top and len(top) <= 4


def test_prompts_may_be_text_or_tokens_one_or_many(server: Any) -> None:
    ask = server.client.completions.create
    ids = [server.bank.encode(prompt)[1:] for prompt in PROMPTS]
    common = {"model": "a1", "max_tokens": 5, "temperature": 0}
    texts = [choice.text for choice in ask(prompt=PROMPTS, **common).choices]
    assert texts == [greedy(server, "a1", prompt, 5) for prompt in PROMPTS]
    assert [choice.text for choice in ask(prompt=ids, **common).choices] == texts
    assert ask(prompt=ids[2], **common).choices[0].text == texts[2]
    own_context = ask(prompt=[server.bank.end, *ids[2]], logprobs=0, echo=True, **common)
    assert own_context.choices[0].text == "<|endoftext|>" + PROMPTS[2] + texts[2]
    assert own_context.choices[0].logprobs.token_logprobs[0] is None


def test_choice_i_of_a_seeded_request_is_the_only_choice_of_seed_plus_i(server: Any) -> None:
    def ask(**more: Any) -> list[str]:
        answer = server.client.completions.create(model="a4", prompt="x", max_tokens=10, temperature=1.3, **more)
        return [choice.text for choice in answer.choices]

    three = ask(n=3, seed=-1)
    assert three == [*ask(seed=-1), *ask(seed=0), *ask(seed=1)]
    assert len(set(three)) == 3


def test_a_stop_string_ends_the_text_before_it_and_usage_counts_what_was_written(server: Any) -> None:
    ask = server.client.completions.create
    common = {"model": "a1", "prompt": "def main(", "max_tokens": 8, "temperature": 0}
    whole = ask(**common)
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 8
    text = whole.choices[0].text
    cut = ask(stop=["\0", text[4:6]], **common)
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (text[: text.index(text[4:6])], "stop")
    assert 0 < cut.usage.completion_tokens < 8
    assert cut.usage.total_tokens == cut.usage.prompt_tokens + cut.usage.completion_tokens
    assert ask(model="a1", prompt="x", echo=True, max_tokens=1).choices[0].text.startswith("x")


def test_auto_asks_the_likeliest_adapter_and_below_the_threshold_the_base(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "def main(self):\n"
    for threshold in (-100.0, 100.0):
        settings = server.service.settings.model_copy(update={"routing_threshold": threshold})
        monkeypatch.setattr(server.service, "settings", settings)
        answer = server.client.completions.create(model="auto", prompt=prompt, max_tokens=4, temperature=0)
        routing = answer.model_extra["routing"]
        assert set(routing["scores"]) == set(NAMES) and routing["threshold"] == threshold
        best = max(routing["scores"], key=routing["scores"].__getitem__)
        assert answer.model == routing["model"] == (best if threshold < 0 else "builtin:small")
        assert routing["adapter"] == (best if threshold < 0 else None)
        assert routing["reason"] == ("the likeliest adapter" if threshold < 0 else "none of the adapters")
        assert -100 < routing["margin"] < routing["scores"][best] and routing["tokens"] > 2
        assert answer.choices[0].text == greedy(server, best if threshold < 0 else "base", prompt, 4)
    assert server.metric('peftune_routed_total{model="builtin:small"}') >= 1
    nothing = server.client.completions.create(model="auto", prompt=" ", max_tokens=1)
    assert nothing.model_extra["routing"] | {"scores": {}} == {
        "model": "builtin:small", "adapter": None, "margin": None, "threshold": 100.0,
        "reason": "none of the adapters", "scores": {}, "tokens": 1,
    }  # fmt: skip
    with pytest.raises(openai.BadRequestError, match="chooses for one prompt"):
        server.client.completions.create(model="auto", prompt=PROMPTS)


def test_chat_is_for_adapters_that_were_trained_on_it_and_renders_as_training_did(server: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    common = {"messages": messages, "max_completion_tokens": 6, "temperature": 0}
    answer = server.client.chat.completions.create(model="a7", logprobs=True, top_logprobs=2, **common)
    (choice,) = answer.choices
    rendered = "System: Be brief.\n\nUser: Hi\n\nAssistant:"
    assert choice.message.content == greedy(server, "a7", rendered, 6).removeprefix(" ")
    assert answer.usage.prompt_tokens == len(server.bank.encode(rendered)) - 1
    told = b"".join(bytes(token.bytes) for token in choice.logprobs.content).decode()
    assert told.removeprefix(" ") == choice.message.content
    assert {len(token.top_logprobs) for token in choice.logprobs.content} == {2}
    events = list(server.client.chat.completions.create(model="a7", stream=True, **common))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events) == choice.message.content
    routed = server.client.chat.completions.create(model="auto", **common)
    assert (routed.model, routed.choices[0].message.content) == ("a7", choice.message.content)
    for other in ("a1", "builtin:small"):
        with pytest.raises(openai.BadRequestError, match="not trained on chat"):
            server.client.chat.completions.create(model=other, **common)


def test_models_are_the_base_and_its_adapters(server: Any) -> None:
    listed = {model.id: model for model in server.client.models.list()}
    assert list(listed) == ["builtin:small", *NAMES]
    assert listed["a7"].model_extra["parent"] == "builtin:small" and listed["a7"].model_extra["chat"] is True
    assert server.client.models.retrieve("a7") == listed["a7"]
    assert server.client.models.retrieve("builtin:small") == listed["builtin:small"]
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("a8")


def test_an_unknown_model_is_an_error_and_never_the_base(server: Any) -> None:
    for name in ("a8", "A1", " a1", "builtin:small/", "gpt2"):
        with pytest.raises(openai.NotFoundError) as caught:
            server.client.completions.create(model=name, prompt="x")
        assert caught.value.code == "model_not_found" and caught.value.param == "model"
    assert 'model="A1"' not in httpx.get(f"{server.url}/metrics").text
