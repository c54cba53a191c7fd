"""What a foreign tokenizer.json may make `tokenizers` do: no pattern that takes for ever, no text that grows at will.

Its patterns are matched by trying (Oniguruma), which gives up after ten million tries for one match, 0.2 s, and may do
so at every position of a text. A repeated group is where tries multiply; the patterns of GPT-2, cl100k, o200k, Llama 3,
Qwen and DeepSeek have none, and at most two repetitions without a bound in any alternative.

And what Transformers leaves open, or gets wrong, in the tokenizers of GPT-2s other than OpenAI's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_LONGEST = 20_000  # characters of a pattern
_REPEATS = 2  # without a bound, in one alternative
_FEW = 16  # times at most: no repetition to speak of
_GROWTH = 1_000  # how many times longer replacements may make a text
_MANY = 1 << 30
_OPENING = re.compile(r"\((?:\?(?:[:=!>]|<[=!]|[ims-]{1,6}:))?(?!\?)")
_COUNT = re.compile(r"\{(?=\d|,\d)(\d{0,9})(,?)(\d{0,9})\}")
_PROPERTY = re.compile(r"\\[pPxo]\{[^}]*\}")
_OTHER_NAMES = (("eos_token", "sep_token"), ("bos_token", "cls_token"))  # BertTokenizer has [SEP] and [CLS] alone
_BACKWARD = re.compile(r"\\[1-9kg]")


def problem_of(state: dict[str, Any]) -> str | None:
    """Why a tokenizer.json is not used, or None."""
    parts = list(_parts(state))
    for part in parts:
        pattern = part.get("Regex")
        if isinstance(pattern, str) and (why := _problem_of_pattern(pattern)):
            shown = pattern if len(pattern) <= 60 else f"{pattern[:60]}…"
            return f"its pattern {shown!r} {why}, so that it may take for ever on some texts"
    growth = prod(_growth(part) for part in parts if part.get("type") in ("Replace", "Prepend"))
    if growth > _GROWTH:
        return f"its replacements may make a text {min(growth, 10**9):,.0f} times longer; expected at most {_GROWTH:,}"
    return None


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in it that are not the vocabulary's."""
    if isinstance(value, dict):
        yield value
        for name, child in value.items():
            if name not in ("vocab", "merges"):
                yield from _parts(child)
    elif isinstance(value, list):
        for child in value:
            yield from _parts(child)


def _growth(part: dict[str, Any]) -> float:
    content = part.get("content") if part["type"] == "Replace" else part.get("prepend")
    pattern = part.get("pattern")
    text = pattern.get("String") if isinstance(pattern, dict) else None
    length = len(content) if isinstance(content, str) else 0
    if part["type"] == "Prepend":
        return 1 + length / 100  # once, before the text
    return max(1.0, length / max(1, len(text)) if isinstance(text, str) else float(length))


def _problem_of_pattern(pattern: str) -> str | None:
    """Why tries may multiply, by a scan that knows escapes, sets, groups and counts."""
    if len(pattern) > _LONGEST:
        return f"has {len(pattern):,} characters"
    at = sets = repeats = 0
    before = ""  # the atom or quantifier that stands there
    varies = [False]  # of each open group: whether it can match in several ways
    last = False  # of the group that was closed last
    while at < len(pattern):
        rest, kind, step = pattern[at : at + 40], pattern[at], 1
        if kind == "\\":
            if _BACKWARD.match(rest) and not sets:
                return "refers to its own groups"
            found = _PROPERTY.match(pattern, at)
            kind, step = "a", len(found[0]) if found else 2
        elif kind == "[":
            sets += 1
        elif sets:
            sets -= kind == "]"
            kind = "a"
        elif kind == "(":
            opening = _OPENING.match(rest)
            if opening is None:
                return "has groups of an unusual kind"
            varies.append(False)
            step = len(opening[0])
        elif kind == ")" and len(varies) > 1:
            last = varies.pop()
            varies[-1] |= last
        elif kind == "|":
            varies[-1], repeats = True, 0
        elif kind in "*+?" or (kind == "{" and _COUNT.match(rest)):
            low, high, step = _bounds(rest)
            if before == "*" and kind in "*{":
                return "repeats a repetition"
            if before == ")" and last and high > 1:
                return "repeats a group that can match in several ways"
            varies[-1] |= low != high
            repeats += before != "*" and high > _FEW
            if repeats > _REPEATS:
                return f"has more than {_REPEATS} repetitions in a row"
            kind = "*"
        at, before = at + step, kind
    return None


def _bounds(quantifier: str) -> tuple[int, int, int]:
    """Least and most repetitions that a text beginning with a quantifier asks for, and how long that is."""
    if counted := _COUNT.match(quantifier):
        low, comma, high = counted.groups()
        most = int(high) if high else _MANY if comma else int(low or 0)
        return int(low or 0), most, len(counted[0])
    return {"*": (0, _MANY, 1), "+": (1, _MANY, 1), "?": (0, 1, 1)}[quantifier[0]]


def name_ends(tokenizer: PreTrainedTokenizerFast, configs: Sequence[dict[str, Any]], rows: int) -> None:
    """Set `eos_token` and `bos_token` where the tokenizer names none that an embedding of so many rows has.

    They are then what one of the configurations says, if that is a special token, or `[SEP]` and `[CLS]`, or what a
    configuration says.
    """
    for name, other in _OTHER_NAMES:
        own = getattr(tokenizer, f"{name}_id")
        if isinstance(own, int) and own < rows:
            continue
        numbers = list(_numbers(configs, f"{name}_id", min(rows, len(tokenizer))))
        texts = [str(tokenizer.convert_ids_to_tokens(number)) for number in numbers]
        special = [text for text in texts if text in _special_texts(tokenizer)]
        if found := [*special, *filter(None, [getattr(tokenizer, other)]), *texts]:
            setattr(tokenizer, name, str(found[0]))


def _numbers(configs: Sequence[dict[str, Any]], key: str, below: int) -> Iterator[int]:
    for config in configs:
        value = config.get(key)
        for number in value if isinstance(value, list) else [value]:
            if type(number) is int and 0 <= number < below:
                yield number


def _special_texts(tokenizer: PreTrainedTokenizerFast) -> set[str]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def repair_unknown(tokenizer: PreTrainedTokenizerFast) -> None:
    """Text that no piece covers becomes the unknown token, wherever that stands in a Unigram vocabulary.

    `T5Tokenizer` of Transformers 5 takes token 2 for it, in rinna's vocabularies the end of text.
    """
    from tokenizers.models import Unigram

    backend: Tokenizer = tokenizer.backend_tokenizer
    unknown = tokenizer.unk_token_id
    if not isinstance(backend.model, Unigram) or not isinstance(unknown, int):
        return
    model = json.loads(backend.to_str())["model"]
    if model["unk_id"] != unknown and unknown < len(model["vocab"]):
        vocabulary = [(piece, score) for piece, score in model["vocab"]]
        backend.model = Unigram(vocabulary, unk_id=unknown, byte_fallback=model.get("byte_fallback", False))


def cuts_as(backend: Tokenizer, state: dict[str, Any]) -> bool:
    """Whether a tokenizer that was built cuts texts by steps of the same kinds as its tokenizer.json says.

    `GPT2Tokenizer` of Transformers 5 builds GPT-2's own steps, whatever the file says (KoGPT2's are others).
    """
    model = state.get("model")
    if isinstance(model, dict) and model.get("type", "BPE") != type(backend.model).__name__:
        return False
    built = [json.loads(part.__getstate__()) if part else None for part in (backend.normalizer, backend.pre_tokenizer)]
    return [_kinds(part) for part in built] == [_kinds(state.get(key)) for key in ("normalizer", "pre_tokenizer")]


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether every text has tokens, and they give it back to the byte, as in GPT-2's own vocabulary."""
    decoder = tokenizer.decoder
    kinds = _kinds(json.loads(decoder.__getstate__()) if decoder else None)
    return kinds == ["ByteLevel"] and tokenizer.normalizer is None


def _kinds(part: Any) -> list[str]:
    """The kinds of the steps in a normalizer, pre-tokenizer or decoder, in order."""
    if not isinstance(part, dict):
        return []
    inner = next((part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part), None)
    return [str(part.get("type"))] if inner is None else [kind for step in inner for kind in _kinds(step)]
