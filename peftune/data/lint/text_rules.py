"""What is probably wrong with texts: faults that train without an error and spoil the result, found while reading.

The names of rules are kept with the tokens, so that a text is looked through once. Every pattern is linear in the text,
and most texts are dismissed by a search for a few fixed strings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence, Set
from typing import NamedTuple

from peftune.data.documents import Document, FileCut, Occurrences
from peftune.data.lint.finding import Finding
from peftune.data.lint.mojibake import is_mojibake, mended
from peftune.data.sources.chat_template import names_a_turn
from peftune.data.sources.plain_text import END_OF_TEXT


class _Rule(NamedTuple):
    what: str
    advice: str
    loud: bool = True


_DAMAGED = "the model learns to write it so; the text was damaged by an earlier conversion: export it again as UTF-8"
RULES: Mapping[str, _Rule] = {
    "blank": _Rule(
        "rows with no scored text", "nothing is learnt from them and they are left out; fill or remove them"
    ),
    "prompt-space": _Rule(
        "prompt ends in white space",
        "GPT-2 puts a space into the word after it: leave it out of prompts, here and when generating",
    ),
    "prompt-blank": _Rule(
        "prompt is blank", "the completion then begins the document; is the column the right one? Else fill it"
    ),
    "completion-space": _Rule(
        "completion ends in white space", "it is scored and learnt; strip it unless you want it written", False
    ),
    "end-inside": _Rule(
        f"{END_OF_TEXT} inside a text",
        "it is read as plain text there; split the documents at it (split_on: endoftext) or remove it",
    ),
    "end-doubled": _Rule(
        f"{END_OF_TEXT} doubled",
        "what lies between is no document and is left out; a text may be missing there: fill it, or keep one of them",
    ),
    "end-missing": _Rule(
        f"files without {END_OF_TEXT} beside others that are cut at it",
        "each is read as one document, so what it holds is learnt as one text; mark the ends in it too, or read it "
        "with split_on of its own",
    ),
    "names-a-turn": _Rule(
        "a message of a chat names a turn (such as User: after a blank line)",
        "a space is put before the name, so that it begins no turn; if it should be one, make it a message of its own",
    ),
    "replacement": _Rule("replacement character U+FFFD", _DAMAGED),
    "mojibake": _Rule("UTF-8 that was read as Latin-1 (such as Ã© for é)", _DAMAGED),
    "control": _Rule("control characters", "remove them, or a model will learn to write them"),
    "line-ends": _Rule(
        "files with mixed line ends", "all become LF when they are read; save them with one kind of line end", False
    ),
    "template": _Rule(
        "template that is not closed (such as {{name or {% if %} without its end)",
        "a model learns to leave it open; close it, fill it in, or remove it",
    ),
    "control-token": _Rule(
        "what looks like a control token (<|name|>, [INST], …) and is none of this base's",
        "it is read in pieces, as any text; name it in data.new_tokens to make it a token, or remove it",
    ),
    "credentials": _Rule(
        "what looks like a credential (a key, a token, or a password in a URL)",
        "a model can learn it by heart and write it for anyone: remove it, and have it replaced where it is valid",
    ),
    "e-mail": _Rule(
        "e-mail addresses", "a model can learn and write them: replace them unless they are meant to be known", False
    ),
}

CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f]")
"""Characters that no text needs; a form feed is white space of old texts, U+0085 a line end."""
_OPEN_FIELD = re.compile(r"\{\{[ \t]*[A-Za-z_][^{}]*(?:\{\{|\Z)|\{%[^{}%]*(?:\{|\Z)")
_BEGINS, _ENDS = re.compile(r"\{%-?[ \t]*(?:if|for)\b"), re.compile(r"\{%-?[ \t]*end(?:if|for)\b")
_CONTROL_MARKS = ("<|", "[INST]", "[/INST]", "<<SYS>>", "<start_of_turn>", "[SEP]", "[PAD]", "[MASK]")
_CONTROL_TOKEN = re.compile("|".join([r"<\|[A-Za-z][\w.-]{0,40}\|>", *map(re.escape, _CONTROL_MARKS[1:])]))
_SECRETS = {
    "AKIA": r"AKIA(?<!\wAKIA)[0-9A-Z]{16}\b",
    "ASIA": r"ASIA(?<!\wASIA)[0-9A-Z]{16}\b",
    "PRIVATE KEY": r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY",
    **{mark: mark + "[A-Za-z0-9]{30}" for mark in ("ghp_", "gho_", "ghu_", "ghs_", "ghr_")},
    "github_pat_": r"github_pat_\w{22}",
    "sk-": r"sk-(?<!\wsk-)(?=[A-Za-z_-]{0,40}[0-9])[A-Za-z0-9_-]{20}",
    "xox": r"xox[abprs]-[0-9A-Za-z-]{10}",
    "AIza": r"AIza[0-9A-Za-z_-]{35}",
    "glpat-": r"glpat-[0-9A-Za-z_-]{20}",
    "hf_": r"hf_(?<!\whf_)[A-Za-z0-9]{30}",
    "://": r"://[^\s/:@'\"<>]{1,64}:[^\s/:@'\"<>]{1,64}@[\w\[]",
}
_PATTERNS = {mark: re.compile(pattern) for mark, pattern in _SECRETS.items()}
_E_MAIL = re.compile(
    r"@(?<=[\w+-]@)(?!example\b)[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){0,4}\.(?:[a-z]{2}|com|org|net|edu|gov|info)\b"
)


def count_faults(
    document: Document, faults: MutableMapping[str, Occurrences], tokens: Set[str] = frozenset({END_OF_TEXT})
) -> None:
    """Count a document in `faults`, which makes what it lacks, under each rule that applies to it.

    `tokens` are the texts that the base's tokenizer has as tokens beside its vocabulary.
    """
    for name in _faults_of(document, tokens):
        faults[name].add(document.source)


def findings_of(faults: Mapping[str, Occurrences]) -> list[Finding]:
    """What was counted by the name of a rule, as findings."""
    return [
        Finding(rule.what, faults[name].rows, faults[name].places(), rule.advice, rule.loud)
        for name, rule in RULES.items()
        if name in faults
    ]


def without_an_end(cuts: Iterable[Sequence[FileCut]], faults: MutableMapping[str, Occurrences]) -> None:
    """Count the text files that `auto` did not cut at the end of text where it cut others of the source there."""
    for files in cuts:
        if any(cut.rule == "endoftext" for cut in files):
            for cut in files:
                if cut.rule != "endoftext" and cut.documents:
                    faults["end-missing"].add(f"{cut.file}:1")


def _faults_of(document: Document, tokens: Set[str]) -> Iterator[str]:
    text, prompt = document.content(), document.prompt
    if prompt is not None:
        if not prompt.strip():
            yield "prompt-blank"
        elif prompt[-1].isspace():
            yield "prompt-space"
        if document.text[-1:].isspace():
            yield "completion-space"
        text = f"{prompt}\n{document.text}"
    if document.turns is not None and not document.ends_turns and names_a_turn(text):
        yield "names-a-turn"
    if END_OF_TEXT in text:
        yield "end-inside"
        if END_OF_TEXT * 2 in text:
            yield "end-doubled"
    if "\ufffd" in text:
        yield "replacement"
    if is_mojibake(text):
        yield "mojibake"
    if CONTROL.search(mended(text)):
        yield "control"
    if ("{{" in text or "{%" in text) and (
        _OPEN_FIELD.search(text) or len(_BEGINS.findall(text)) != len(_ENDS.findall(text))
    ):
        yield "template"
    if any(mark in text for mark in _CONTROL_MARKS) and not tokens >= set(_CONTROL_TOKEN.findall(text)):
        yield "control-token"
    if any(mark in text and pattern.search(text) for mark, pattern in _PATTERNS.items()):
        yield "credentials"
    if "@" in text and _E_MAIL.search(text):
        yield "e-mail"
