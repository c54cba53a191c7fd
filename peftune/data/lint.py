"""What is probably wrong with a corpus: things that train without an error and spoil the result."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from peftune.data.documents import Document, LeftOut
from peftune.data.sources.chat_template import names_a_turn
from peftune.data.sources.plain_text import END_OF_TEXT


@dataclass(frozen=True)
class Finding:
    """One kind of problem: how many documents have it, the first of them, and what to do."""

    what: str
    documents: int
    first: str
    advice: str


_MOJIBAKE = re.compile("Ã[\u0080-\u00bf]|â€")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_DAMAGED = "the text was damaged by an earlier conversion; export it again as UTF-8"

_RULES: tuple[tuple[str, Callable[[Document], object], str], ...] = (
    (
        "prompt ends in white space",
        lambda document: (document.prompt or "")[-1:].isspace(),
        "GPT-2 puts a space into the word after it: leave it out of prompts, here and when generating",
    ),
    (
        "prompt is blank",
        lambda document: document.prompt is not None and not document.prompt.strip(),
        "the completion then begins the document; is the column the right one?",
    ),
    (
        "completion ends in white space",
        lambda document: document.prompt is not None and document.text[-1:].isspace(),
        "it is scored and learnt; strip it unless you want it written",
    ),
    (
        f"{END_OF_TEXT} inside a text",
        lambda document: END_OF_TEXT in document.content(),
        "it is read as plain text there; split the documents at it (split_on: endoftext) or remove it",
    ),
    (
        "a message of a chat names a turn (such as User: after a blank line)",
        lambda document: document.turns is not None and not document.ends_turns and names_a_turn(document.content()),
        "a space is put before the name, so that it begins no turn; if it should be one, make it a message of its own",
    ),
    ("replacement character U+FFFD", lambda document: "\ufffd" in document.content(), _DAMAGED),
    ("UTF-8 that was read as Latin-1 (such as Ã© for é)", lambda d: _MOJIBAKE.search(d.content()), _DAMAGED),
    ("control characters", lambda d: _CONTROL.search(d.text), "remove them, or a model will learn to write them"),
)


def lint(documents: Iterable[Document]) -> list[Finding]:
    """Findings over a stream of documents, in a fixed order, only those that occur."""
    counts = [0] * len(_RULES)
    first = [""] * len(_RULES)
    for document in documents:
        for number, (_, applies, _) in enumerate(_RULES):
            if applies(document):
                first[number] = first[number] or document.source
                counts[number] += 1
    found = zip(_RULES, counts, first, strict=True)
    return [Finding(what, count, source, advice) for (what, _, advice), count, source in found if count]


def of_rows(left_out: LeftOut) -> list[Finding]:
    """A finding for each reason for which rows were skipped, the commonest first, and for what `where` never found."""
    advice = "nothing is learnt from them; mend them, or look whether the right columns are read"
    several = sorted(left_out.skipped.items(), key=lambda item: -item[1].rows)
    found = [Finding(f"skipped rows, {why}", group.rows, ", ".join(group.first), advice) for why, group in several]
    if left_out.never:
        what = f"where asks for what no row holds: {', '.join(left_out.never)}"
        found.append(Finding(what, 0, "nowhere", "look for a spelling mistake, or leave it out"))
    return found
