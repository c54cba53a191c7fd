"""The verbs `report` and `watch`, on runs that are finished, in progress, damaged, or written by somebody else."""

from __future__ import annotations

import base64
import json
import os
import re
import threading
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from browsers import chromium
from recorded_runs import RECIPE, Make, events_of, lines_of

from peftune.cli import main
from peftune.config.recipe import recipe_from
from peftune.training.report.curves import thinned

EVIL = "</pre><script>alert(1)</script><img src=http://evil.test/x onerror=alert(1)>\" onload='alert(1)\ud800\0\u202e"


class Page(HTMLParser):
    """What a browser would make of a page: tags with their attributes, and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def report(*words: str, code: int = 0) -> Page:
    assert main.run(["report", *words]) == code
    return Page(Path("report.html").read_text(encoding="utf-8"))


def test_a_report_holds_the_whole_run(make: Make) -> None:
    page = report(str(make(versions={"torch": "2.13"}, peftune="0.1", init=[{"adapter": "old", "base": "gpt2"}])))
    for told in (
        "ended after step 40", "gpt2", "430,080 tokens to learn", "empty documents: 3, first poems.txt:7",
        "step 40: a spike, loss 9.000", "Once", " upon 20 times", "old (None, base gpt2)", "80 s",
        "2,000.0", "1,900.0", "-5 %", "2.13", "54.58", "20.08",
    ):  # fmt: skip
        assert any(told in text for text in page.texts), told
    titles = [str(picture["alt"]).removesuffix(", by step") for picture in page.all("img")]
    losses = ["training loss", "validation loss: poems", "validation loss: code"]
    assert titles == [*losses, "learning rate", "gradient norm", "speed"]
    assert not [m for m in page.all("meta") if m.get("http-equiv") == "refresh"]


def test_the_recipe_in_a_report_is_the_recipe_of_the_run(make: Make) -> None:
    page = report(str(make()))
    text = next(text for text in page.texts if text.startswith("base: gpt2"))
    assert recipe_from(yaml.safe_load(text), []) == RECIPE.model_copy(
        update={"optim": RECIPE.optim.model_copy(update={"lr": 1e-3})}
    )
    assert any("peftune train recipe.yaml run.out=adapters/poems-again" in text for text in page.texts)


def test_several_runs_share_the_curves_and_a_table_of_what_differs(make: Make) -> None:
    make("x"), make("y", events_of(lr=5e-4))
    page = report("x", "y")
    assert len(page.all("img")) == 6
    keys = page.texts[page.texts.index("Recipe keys that differ") :]
    assert keys[1:7] == ["key", "x", "y", "optim.lr", "0.001", "0.0005"] and keys[7] == "Data"


def test_nothing_that_a_run_recorded_becomes_markup(make: Make) -> None:
    def planted(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: planted(child) for key, child in value.items()} | {EVIL: EVIL}
        if isinstance(value, list):
            return [planted(child) for child in value]
        return value + EVIL if isinstance(value, str) else value

    events = [planted(event) | {"event": event["event"]} for event in events_of()]
    name = "a" + EVIL.replace("/", "|").replace("\0", "").replace("\ud800", "")
    figures = {"base": {"perplexity": 3.0}, "adapter": {"perplexity": 2.0}}
    make(name, events, peftune=EVIL, versions={"torch": EVIL}, metrics={EVIL: figures}, init=[{"adapter": EVIL}])
    evaluated = {"domains": {EVIL: {"documents": 3}}, "rows": {EVIL: {EVIL: {"perplexity": 3.0}}}}
    evaluated["intervals"] = {EVIL: {EVIL: {"perplexity": [2.0, 4.0]}}}
    Path("eval.json").write_text(json.dumps(evaluated))
    page = report(name, "--eval", "eval.json")
    plain = "html head meta title style body header h1 p main ul li div table thead tr th tbody td section h2 h3 pre"
    assert {tag for tag, _ in page.tags} == {*plain.split(), "figure", "figcaption", "img"}
    attributes = {key for _, attributes in page.tags for key in attributes}
    assert attributes <= {
        "lang",
        "charset",
        "http-equiv",
        "content",
        "name",
        "class",
        "scope",
        "aria-label",
        "alt",
        "src",
    }
    assert {str(picture["src"])[:26] for picture in page.all("img")} == {"data:image/svg+xml;base64,"}
    pictures = [base64.b64decode(str(picture["src"])[26:]) for picture in page.all("img")]
    assert not [picture for picture in pictures if b"script" in picture or b"evil" in picture]
    assert sum("<script>alert(1)</script>" in text for text in page.texts) > 20
    assert not re.search("[\0\u202e\ud800]", "".join(page.texts))


def test_figures_with_intervals_come_from_eval(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"perplexity": [2.0, 4.0], "against_base": {"loss": -0.5, "interval": [-0.75, -0.25]}}
    found = {
        "domains": {"d": {"documents": 3}},
        "rows": {"a": {"d": {"perplexity": 3.0}}},
        "intervals": {"a": {"d": row}},
    }
    Path("eval.json").write_text(json.dumps(found))
    page = report(str(make()), "--eval", "eval.json")
    assert "3.00 [2.00, 4.00]" in page.texts and "-0.5000 [-0.7500, -0.2500]" in page.texts
    Path("eval.json").write_text(json.dumps({"domains": {"d": []}, "rows": {"a": 3}}))
    report("a", "--eval", "eval.json", code=2)
    assert capsys.readouterr().err.startswith("peftune: the evaluation holds no figures with intervals; expected")


DAMAGED = {
    b'{"event": "train", "step": 41, "lo': "",  # as a crash leaves it
    b"\0\0\xff\n{}\n{}\n": "damaged; it and the 2 after it are left out",
    b'{"event": "train", "step": "x", "loss": []}\n': "damaged; it and the 0 after it are left out",
    b'{"event": "sample", "step": {}, "prompt": [1]}\n{"event": "memory", "bytes_per_rank": 7}\n': "",
    b'{"event": "start", "recipe": 5, "total_steps": "x", "notes": 7}\n': "",
}


def test_of_damaged_runs_the_report_shows_what_is_left(make: Make) -> None:
    for number, damage in enumerate(DAMAGED):
        path = make(str(number), events_of(25, ended=False)) / "metrics.jsonl"
        path.write_bytes(path.read_bytes() + damage)
        os.utime(path, (1, 1))
    page = report(*map(str, range(len(DAMAGED))))
    assert page.texts.count("stopped, step 25 of 40") == len(DAMAGED) and len(page.all("img")) == 6
    for number, told in enumerate(DAMAGED.values()):
        problems = [text for text in page.texts if text.startswith(f"{number}: {number}/metrics.jsonl")]
        assert len(problems) == bool(told) and all(text.endswith(told) for text in problems)


def test_a_run_without_its_beginning_or_its_metrics_has_a_report(make: Make) -> None:
    make("headless", events_of()[1:]), make("empty", [], recipe=RECIPE.model_dump(mode="json"), step=7)
    (make("damaged") / "peftune.json").write_text("{")
    make("strange", [{"event": "start", "recipe": 5, "total_steps": True, "notes": 7}], versions=3, metrics={"d": 4})
    page = report("headless", "empty/peftune.json", "damaged/metrics.jsonl", "strange")
    assert page.texts.count("ended after step 40") == 2 and "ended after step 7" in page.texts
    assert any("damaged: peftune.json: cannot be read" in text for text in page.texts)


@pytest.mark.parametrize("verb", ["report", "watch"])
def test_what_is_no_run_is_refused_in_one_line(make: Make, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    Path("text.txt").write_text("poem\n")
    Path("pipe").mkdir()
    os.mkfifo("pipe/metrics.jsonl")
    for given in ("none", "text.txt", "pipe", ".", "x" * 300):
        assert main.run([verb, given]) == 2, given
        assert re.fullmatch(
            "peftune: [^\n]*(no run is there, expected|cannot be read)[^\n]*\n", capsys.readouterr().err
        )


def test_a_long_run_makes_a_page_of_bounded_size_and_keeps_its_spikes(make: Make) -> None:
    one = events_of(1, ended=False)
    train = {"event": "train", "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 5.0}
    losses = [9.0 if step == 4321 else 2 + (step * 7919 % 100) / 100 for step in range(12_000)]
    make("a", one + [{**train, "step": step, "loss": loss} for step, loss in enumerate(losses)])
    report("a")
    assert Path("report.html").stat().st_size < 1_000_000
    import numpy as np

    x, y = thinned((np.arange(12_000), np.array(losses)))
    assert len(x) <= 2000 and y.max() == 9.0 and x[y.argmax()] == 4321


def test_a_report_is_rewritten_until_the_run_ends(make: Make) -> None:
    path = make("a", events_of(20, ended=False)) / "metrics.jsonl"
    seen: list[bool] = []

    def end_the_run() -> None:
        while not Path("report.html").exists():
            time.sleep(0.05)
        seen.append('http-equiv="refresh" content="1"' in Path("report.html").read_text())
        path.write_text(lines_of(events_of()))

    thread = threading.Thread(target=end_the_run)
    thread.start()
    page = report("a", "--every", "1")
    thread.join()
    assert seen == [True] and "ended after step 40" in page.texts
    assert not [m for m in page.all("meta") if m.get("http-equiv") == "refresh"]


def make_fleet(make: Make, count: int) -> None:
    for number in range(count):
        events = events_of(20 + number % 21, lr=1e-4 * (number + 1), ended=number % 2 == 0)
        train = [event for event in events if event["event"] == "train"]
        make(f"fleet/trial-{number}", [*events[:1], *(dict(event, loss=9.0 - number) for event in train), *events[1:]])


def test_of_many_runs_the_page_has_short_rows_colours_of_their_own_and_few_bytes(make: Make) -> None:
    make_fleet(make, 32)
    page = report("fleet")
    assert Path("report.html").stat().st_size < 1_500_000
    assert page.texts[0] == "trial-0 … trial-31, 32 runs · peftune report"
    titles = [str(picture["alt"]).removesuffix(", by step") for picture in page.all("img")]
    assert titles[0].startswith("training loss (smoothed)") and titles[3:] == [
        "learning rate", "gradient norm (smoothed)", "speed (smoothed)"
    ]  # fmt: skip
    assert len({line["stroke"] for line in page.all("path")}) == 32
    tables = Path("report.html").read_text(encoding="utf-8").split("<table")[1:]
    assert max(table.split("</thead>")[0].count("<th ") for table in tables) <= 8
    assert page.texts.index("all runs") < page.texts.index("gpt2") < page.texts.index("state")
    assert (
        "20: upon 20 times" in page.texts
        and "trial-0, trial-1, trial-2, trial-3, trial-4, trial-5 and 26 more" in page.texts
    )
    assert len(page.all("details")) == 32


def test_a_browser_loads_nothing_and_the_page_fits_its_width(make: Make) -> None:
    make("a"), make("b" + "long" * 20, events_of(lr=5e-4))
    make_fleet(make, 13)
    said, asked = [], []
    with chromium() as browser:
        page = browser.new_context().new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("request", lambda request: asked.append(request.url[:5]))
        for runs in (["a", "b" + "long" * 20], ["fleet"]):
            report(*runs)
            page.goto(Path("report.html").absolute().as_uri())
            for width in (1280, 390):
                page.set_viewport_size({"width": width, "height": 900})
                assert page.evaluate("document.documentElement.scrollWidth") <= width
            loaded = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0)")
            assert loaded == [True] * 6
    assert said == [] and set(asked) <= {"file:", "data:"}
