"""Scores of texts are those of the E2E challenge's own script, measured with it on its own example."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from peftune.errors import UserError
from peftune.inference.evaluation.ptb_tokens import ptb_words
from peftune.inference.evaluation.text_metrics import bleu, meteor_score, rouge_l, score_texts

sacrebleu = pytest.importorskip("sacrebleu", reason="the extra `score` is not installed")
cocoeval = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer", reason="the extra `score` is not installed")
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no Java")

EXAMPLE = Path(__file__).parent / "e2e_metrics"
HYPOTHESES = (EXAMPLE / "baseline-output.txt").read_text(encoding="utf-8").splitlines()
REFERENCES = [g.splitlines() for g in (EXAMPLE / "devel-conc.txt").read_text(encoding="utf-8").strip().split("\n\n")]
# What the script prints, with all digits (its shares as percent); METEOR is that of its Java program.
OFFICIAL = {
    "BLEU": 72.02928494322162, "NIST": 7.788887609555574, "ROUGE-L": 79.09526131515365, "CIDEr": 2.303943135258847,
}  # fmt: skip
METEOR = 48.00716745732023
# The same where the first reference is the text, and one to four of the others are the references.
SECOND = {
    "BLEU": 23.080510236001048, "NIST": 3.867791270478302, "ROUGE-L": 46.098929066266886, "CIDEr": 1.2819628992872723,
}  # fmt: skip
# What Stanford's PTBTokenizer 3.4.1 makes of it in lower case.
PROSE = {
    "Adam Koc (born 5 October 1990) plays for the club A.S. Roma; its ground is 1,235.5 metres long.": (
        "adam koc -lrb- born 5 october 1990 -rrb- plays for the club a.s. roma ; its ground is 1,235.5 metres long ."
    ),
    "The dish costs £20-25, i.e. \"cheap\"; it isn't bad – it’s good… Don't you think? 50% off!": (  # noqa: RUF001
        "the dish costs # 20-25 , i.e. `` cheap '' ; it is n't bad -- it 's good ... do n't you think ? 50 % off !"
    ),
    "It was founded in St. Louis, on 14/02/1929, at 10:30 a.m.; No. 5 is Dr. No's.": (
        "it was founded in st. louis , on 14/02/1929 , at 10:30 a.m. ; no. 5 is dr. no 's ."
    ),
    "He won 2-1 vs. F.C. with a $5.50 ticket, €3: *great* [sic] {x} <b>y</b> #1 @home &amp; www.foo.com/bar": (
        "he won 2-1 vs. f.c. with a $ 5.50 ticket , $ 3 : * great * -lsb- sic -rsb- -lcb- x -rcb- <b> y </b> # 1 @home "
        "& www.foo.com/bar"
    ),
    "You cannot; we gonna go. 'Tis over, O'Brien's dogs' tails ne'er say go'st now. A 3-star, kids-friendly place.": (
        "you can not ; we gon na go . 't is over , o'brien 's dogs ' tails ne'er say go ' st now . a 3-star , "
        "kids-friendly place ."
    ),
}


def without_punctuation(tokens: str) -> list[str]:
    return [token for token in tokens.split() if token not in cocoeval.PUNCTUATIONS]


def scores(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    found = score_texts({"a": hypotheses}, references)["systems"]["a"]
    return {metric: facts["score"] for metric, facts in found.items()}


def test_scores_are_those_of_the_official_script() -> None:
    for found, official in (
        (scores(HYPOTHESES, REFERENCES), OFFICIAL),
        (scores([r[0] for r in REFERENCES], [r[1 : i % 4 + 2] for i, r in enumerate(REFERENCES)]), SECOND),
    ):
        assert found.keys() == official.keys()
        for metric, score in official.items():
            np.testing.assert_allclose(found[metric], score, rtol=1e-13, err_msg=metric)


@pytest.mark.slow
@needs_java
def test_meteor_is_that_of_the_official_script() -> None:
    words = [[" ".join(ptb_words(text)) for text in texts] for texts in REFERENCES]
    found = meteor_score([" ".join(ptb_words(text)) for text in HYPOTHESES], words)
    np.testing.assert_allclose(found, METEOR, rtol=1e-13)


def test_meteor_without_java_is_one_line_and_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="METEOR needs Java, and there is no `java` on the PATH"):
        meteor_score(["a"], [["a"]])
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    with pytest.raises(UserError, match="METEOR's Java program ended without an answer"):
        meteor_score(["a"], [["a"]])


def test_a_missing_library_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu.metrics", None)
    with pytest.raises(UserError, match=r"scores need sacrebleu.metrics; pip install 'peftune\[score\]'"):
        scores(["a"], [["a"]])


def test_words_are_those_of_the_penn_treebank() -> None:
    for text, tokens in PROSE.items():
        assert ptb_words(text) == without_punctuation(tokens)


@needs_java
def test_words_are_those_of_the_program_that_the_metrics_were_made_with() -> None:
    texts = [*HYPOTHESES, *(text for texts in REFERENCES for text in texts), *PROSE]
    jar = Path(cocoeval.__file__).with_name(cocoeval.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    answer = subprocess.run(
        [*command, "-encoding", "UTF-8"],
        input="\n".join(texts) + "\n",
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    lines = answer.stdout.splitlines()
    assert len(lines) == len(texts)
    assert [ptb_words(text) for text in texts] == [without_punctuation(line) for line in lines]


def test_texts_without_a_match_or_a_word_have_the_lowest_score() -> None:
    for hypotheses, references in (
        (["", ""], [["a b c d e"], ["c"]]),
        (["x y z w v", "q"], [["a b"], ["c"]]),
        (["a b"], [["a b"]]),  # no 4-gram to match
    ):
        found = scores(hypotheses, references)
        assert found["BLEU"] == 0 and all(np.isfinite(list(found.values())))


def test_bleu_from_summed_counts_is_sacrebleu_s_own() -> None:
    turned = [*REFERENCES[1:], REFERENCES[0]]
    widest = max(map(len, turned))
    streams = [[texts[at] if at < len(texts) else None for texts in turned] for at in range(widest)]
    metric = sacrebleu.BLEU(lowercase=True, tokenize="13a", smooth_method="none")
    np.testing.assert_allclose(bleu(HYPOTHESES, turned).value(), metric.corpus_score(HYPOTHESES, streams).score)


def test_rouge_l_is_pycocoevalcap_s_and_long_texts_take_no_time() -> None:
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge").Rouge()
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(list("abcdef"), random.integers(1, 90))) for _ in range(80)]
    hypotheses, references = texts[:20], [texts[20 + 3 * i : 20 + 3 * i + 3] for i in range(20)]
    wanted = [100 * rouge.calc_score([text], given) for text, given in zip(hypotheses, references, strict=True)]
    np.testing.assert_allclose(rouge_l(hypotheses, references).items[:, 0], wanted, rtol=1e-13)
    long = " ".join(map(str, random.integers(0, 100, 20_000)))
    began = time.monotonic()
    assert rouge_l([long], [[long[::-1], long]]).value() == pytest.approx(100)
    assert time.monotonic() - began < 30  # a table of 20,000 x 20,000 takes minutes, and gigabytes


def test_two_systems_are_compared_on_the_same_items() -> None:
    """All of the difference is in one item, so an interval of the two alone would be far wider."""
    worse = [HYPOTHESES[0].replace("family-friendly", "cheap"), *HYPOTHESES[1:]]
    found = score_texts({"a": HYPOTHESES, "same": HYPOTHESES, "worse": worse}, REFERENCES)
    assert (found["items"], found["references"]) == (10, 137)
    for metric, facts in found["systems"]["same"].items():
        assert facts["against"] == {"score": 0.0, "interval": (0.0, 0.0)}, metric
    for metric, facts in found["systems"]["worse"].items():
        low, high = facts["against"]["interval"]
        assert low <= facts["against"]["score"] < 0, metric
        assert high - low < 0.7 * (facts["interval"][1] - facts["interval"][0]), metric
