"""The corpora that every Python carries: parts that share nothing, the same on every call."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

import pytest

from peftune.data.documents import Document
from peftune.data.sources import builtin
from peftune.data.sources.builtin import DOMAINS, documents, line_hashes, part_of

PARTS = ("base", "train", "heldout")
Corpora = dict[tuple[str, str], list[Document]]


@pytest.fixture(scope="module")
def corpora() -> Corpora:
    """Every part of every domain, read once: parsing the standard library takes seconds."""
    return {(domain, part): documents(domain, part) for domain in DOMAINS for part in PARTS}  # type: ignore[arg-type]


def texts(corpora: Corpora, domain: str, part: str) -> set[str]:
    return {document.text for document in corpora[domain, part]}


def paragraphs(corpora: Corpora, part: str) -> set[str]:
    return {p.strip() for document in corpora["docs", part] for p in document.text.split("\n\n")} - {""}


def long_lines(corpora: Corpora, domain: str, part: str) -> Iterator[set[str]]:
    for document in corpora[domain, part]:
        yield {line.strip() for line in document.text.splitlines() if len(line.strip().encode()) >= 30}


def test_adapters_have_text_to_learn_and_to_be_measured_on(corpora: Corpora) -> None:
    for domain in DOMAINS:
        for part in ("train", "heldout"):
            size = sum(len(document.text) for document in corpora[domain, part])
            assert size > 20_000, (domain, part)
    assert corpora["code", "base"] and not corpora["docs", "base"] and not corpora["unicode", "base"]


def test_no_document_is_blank_nameless_or_repeated(corpora: Corpora) -> None:
    for found in corpora.values():
        assert all(document.text.strip() and document.source and document.prompt is None for document in found)
        assert len({document.text for document in found}) == len(found)


def test_parts_share_no_document(corpora: Corpora) -> None:
    for domain in DOMAINS:
        base, train, heldout = (texts(corpora, domain, part) for part in PARTS)
        assert not base & train and not base & heldout and not train & heldout


def test_modules_and_rows_lie_in_one_part_alone(corpora: Corpora) -> None:
    for domain in ("code", "unicode"):
        where = [{document.source.split(":")[0] for document in corpora[domain, part]} for part in PARTS]
        assert not where[0] & where[1] and not where[0] & where[2] and not where[1] & where[2]


def test_no_paragraph_of_the_heldout_reference_is_learnt(corpora: Corpora) -> None:
    assert not paragraphs(corpora, "heldout") & paragraphs(corpora, "train")


def test_what_the_base_learnt_stands_in_no_other_document_for_the_most_part(corpora: Corpora) -> None:
    taught = set().union(*long_lines(corpora, "code", "base"))
    hashes = {int(number) for line in taught for number in line_hashes(line)}
    for domain in DOMAINS:
        for part in ("train", "heldout"):
            for lines in long_lines(corpora, domain, part):
                known = sum(int(line_hashes(line)[0]) in hashes for line in lines)
                assert known <= len(lines) / 2 or not builtin.TAUGHT.is_file(), (domain, part, lines)


def test_character_names_are_no_text_of_the_base(corpora: Corpora) -> None:
    taught = {line for lines in long_lines(corpora, "code", "base") for line in lines}
    for part in ("train", "heldout"):
        for document in corpora["unicode", part]:
            names = document.text.splitlines()
            assert all(unicodedata.lookup(name) for name in names)
            assert not {name for name in names if len(name) >= 30} & taught


def test_a_second_reading_gives_the_same(corpora: Corpora) -> None:
    for domain in ("docs", "unicode"):
        assert documents(domain, "heldout") == corpora[domain, "heldout"]
    assert documents("code", "heldout") == corpora["code", "heldout"]


def test_shares_are_about_those_that_the_docstring_states() -> None:
    names = [f"module/number_{number}" for number in range(5000)]
    for domain, shares in (("code", (0.88, 0.06, 0.06)), ("docs", (0, 0.85, 0.15)), ("unicode", (0, 0.85, 0.15))):
        found = [part_of(domain, name) for name in names]
        for part, share in zip(PARTS, shares, strict=True):
            assert abs(found.count(part) / len(names) - share) < 0.02


def test_the_part_of_a_name_never_changes() -> None:
    """These are written down: another hash would let text that was learnt change sides."""
    names = ["argparse", "fractions", "gzip", "ipaddress", "secrets", "json/decoder"]
    assert [part_of("code", name) for name in names] == ["base", "train", "train", "heldout", "heldout", "base"]
    assert part_of("docs", "The if statement") == part_of("unicode", "U+0040") == "train"
