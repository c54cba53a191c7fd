"""Special tokens in prompts: the model's adapter says how they are read, and a request may say otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PROMPT = "a<|endoftext|>b"


def test_a_server_follows_the_adapter_unless_the_request_says_otherwise(start: Any, make: Any, tmp_path: Path) -> None:
    recipe = {"data": {"special_tokens": "parse"}}
    adapters = {
        "parses": make(tmp_path / "parses", 1, recipe=recipe, chat=True),
        "plain": make(tmp_path / "plain", 2),
    }
    with start(adapters, roots=(tmp_path,)) as server:
        token, end = server.bank.encode(PROMPT, "parses"), server.bank.end
        plain = server.bank.encode(PROMPT)
        assert end in token[1:] and end not in plain[1:]
        ways: tuple[tuple[dict[str, Any], list[int]], ...] = (
            ({"model": "parses"}, token), ({"model": "plain"}, plain), ({"model": "base"}, plain),
            ({"model": "parses", "split_special_tokens": True}, plain),
            ({"model": "plain", "split_special_tokens": False}, token),
        )  # fmt: skip
        for how, ids in ways:
            assert server.post("/tokenize", prompt=PROMPT, **how).json()["tokens"] == ids[1:], how
            asked = {"prompt": PROMPT, "max_tokens": 1, "return_token_ids": True, **how}
            answer = server.post("/v1/completions", **asked).json()
            assert answer["choices"][0]["prompt_token_ids"] == ids[1:], how
            assert ("warnings" in answer) == (ids == plain)
        messages = [{"role": "user", "content": PROMPT}]
        answer = server.post("/v1/chat/completions", model="parses", messages=messages, max_tokens=1).json()
        assert (
            answer["usage"]["prompt_tokens"] == len(server.bank.encode(f"User: {PROMPT}\n\nAssistant:", "parses")) - 1
        )
        refused = server.post("/v1/completions", model="auto", prompt=PROMPT, max_tokens=1)
        assert refused.status_code == 400 and "split_special_tokens true or false" in refused.text
        for allowed in ({"prompt": "ab"}, {"prompt": PROMPT, "split_special_tokens": True}):
            assert server.post("/v1/completions", model="auto", max_tokens=1, **allowed).status_code == 200
