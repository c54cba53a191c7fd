"""Chat in plain words: a template that a GPT-2 can learn without a new token.

    System: You are brief.

    User: Hello.

    Assistant: Hi.

    User: Bye.

    Assistant: Farewell.<|endoftext|>

Scored is what the assistant decides: its text (with the space before it), and how its turn ends: with
`<|endoftext|>` at the end of the conversation, or with `\\n\\nUser:` (`\\n\\nSystem:`) where another turn follows. A
generation is therefore complete at `<|endoftext|>` or at any of `STOPS`. White space around a message is removed, and
messages after the assistant's last are left out: nothing in them is scored.

A developer's message and what a tool returned are context, as the system's messages are, and stand under its name.

No message can begin a turn: where its text has one of `STOPS`, a space is put before the name (`\\n\\n User:`), in
training as in serving. A special token written in a message is text, as everywhere (`data.tokens.encode`).

With `data.chat: eos-turns` there are no names: each message, whoever says it, is followed by the end-of-text token, as
DialoGPT was trained (`Hello.<|endoftext|>Hi.<|endoftext|>`), and nothing stands before the first. No message can end
its turn: the end token that it spells out is text.

The cuts between parts are where GPT-2's own pre-tokenizer cuts, so the ids are those of the rendered text in one call.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from peftune.data.documents import BadRow
from peftune.data.rows.chat_messages import said
from peftune.data.sources.plain_text import unix_line_ends

EOS_TURNS = "eos-turns"
NAMES = {"system": "System", "developer": "System", "tool": "System", "user": "User", "assistant": "Assistant"}
BETWEEN = "\n\n"
STOPS = tuple(dict.fromkeys(f"{BETWEEN}{name}:" for name in NAMES.values()))
_ANY_NAME = "|".join(map(re.escape, dict.fromkeys(NAMES.values())))
_FORGED = re.compile(f"(?<={BETWEEN})(?=(?:{_ANY_NAME}):)")
_DISARMED = re.compile(f"{BETWEEN} (?:{_ANY_NAME}):")

Turns = tuple[tuple[str, bool], ...]


def render_chat(messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True) -> str:
    """The messages as text, ready to be continued by the assistant; UserError for a role or content we do not know."""
    turns = [_header(role) + _body(content) for role, content in _checked(messages, "messages")]
    return BETWEEN.join([*turns, _header("assistant")] if add_generation_prompt else turns)


def turns_of(messages: Any, location: str, chat: str = "plain") -> Turns:
    """Parts of a training conversation as (text, scored), which concatenate to `render_chat` of the messages.

    With `chat` eos-turns they are the messages: the end-of-text token follows each.

    Raises BadRow naming `location` where there is no assistant message, or a role or content that we do not know.
    """
    ends_turns = chat == EOS_TURNS
    conversation = _checked(messages, location, names_turns=not ends_turns)
    while conversation and conversation[-1][0] != "assistant":
        conversation.pop()
    if not conversation:
        raise BadRow(location, "no message of the assistant", "; there is nothing to learn from it")
    if ends_turns:
        return tuple((content, role == "assistant") for role, content in conversation)
    parts: list[tuple[str, bool]] = []
    scored, text = False, ""
    for number, (role, content) in enumerate(conversation):
        text += (BETWEEN if number else "") + _header(role)
        if scored != (role == "assistant"):
            parts.append((text, scored))
            scored, text = not scored, ""
        text += _body(content)
    return (*parts, (text, scored))


def contents_of(messages: Sequence[dict[str, Any]]) -> list[str]:
    """The texts of the messages, for eos-turns; UserError for a role or content that we do not know."""
    return [content for _, content in _checked(messages, "messages", names_turns=False)]


def stops_of(chat: str) -> tuple[str, ...]:
    """What ends the assistant's turn beside the end-of-text token."""
    return () if chat == EOS_TURNS else STOPS


def names_a_turn(text: str) -> bool:
    """Whether a message of the rendered `text` has what would begin a turn, but for the space that was put there."""
    return _DISARMED.search(text) is not None


def _header(role: str) -> str:
    return f"{NAMES[role]}:"


def _body(content: str) -> str:
    return f" {content}" if content else ""


def _checked(messages: Any, location: str, names_turns: bool = True) -> list[tuple[str, str]]:
    """(role, content) of each message, without white space around the content, which begins no turn with a name."""
    texts = [(role, unix_line_ends(text).strip()) for role, text in said(messages, NAMES, location)]
    return [(role, _FORGED.sub(" ", text)) for role, text in texts] if names_turns else texts
