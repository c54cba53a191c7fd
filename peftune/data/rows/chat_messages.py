"""The messages of a conversation as people have them, in training and in serving: who says what.

| what stands there                                    | is read as                                                 |
|------------------------------------------------------|------------------------------------------------------------|
| `{role, content}`                                    | that                                                       |
| `{from, value}` (ShareGPT)                           | the same; `human` is the user, `gpt` the assistant         |
| content as OpenAI's list of text parts               | the parts joined                                           |
| an assistant's message of `tool_calls` without text  | left out: the calls are not written                        |
| all of it as JSON in a text (a cell of a csv file)   | what the JSON says                                         |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from peftune.data.documents import BadRow
from peftune.data.rows.row_columns import kind_of, scalar_text

_SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}


def said(messages: Any, roles: Mapping[str, str], location: str) -> list[tuple[str, str]]:
    """(role, text) of each message that says something; BadRow for a role not among `roles`, and for other content."""
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            raise BadRow(location, "messages are a text that is not JSON", "; expected a list of messages") from None
    if not isinstance(messages, list | tuple):
        raise BadRow(location, f"expected a list of messages, found {kind_of(messages)}")
    found = []
    for number, message in enumerate(messages, start=1):
        place = f"{location}: message {number}"
        role, content = _role_and_content(message, place)
        if not isinstance(role, str) or role not in roles:
            raise BadRow(place, f"role {role!r}"[:60], f"; expected {', '.join(roles)}")
        text = joined_parts(content)
        if text is None and not message.get("tool_calls"):
            raise BadRow(place, f"content is {kind_of(content)}", "; expected a string")
        if text or not message.get("tool_calls"):
            found.append((role, text or ""))
    return found


def joined_parts(content: Any) -> str | None:
    """The text of a message: a string, a number, or a list of text parts; None where it is none of these."""
    if not isinstance(content, list | tuple):
        return scalar_text(content)
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None  # type: ignore[arg-type]


def _role_and_content(message: Any, place: str) -> tuple[Any, Any]:
    if isinstance(message, dict):
        if "role" in message and ("content" in message or message.get("tool_calls")):
            return message["role"], message.get("content")
        if {"from", "value"} <= set(message):
            role = message["from"]
            return _SHAREGPT.get(role, role) if isinstance(role, str) else role, message["value"]
    keys = ", ".join(map(str, message)) if isinstance(message, dict) else kind_of(message)
    raise BadRow(place, "expected role and content", f", found {keys}")
