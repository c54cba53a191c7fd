"""The playground in a real browser: what a person types, sees, stops and shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest
import torch
from browsers import chromium

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'peftune[dev]'")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as launched:
        yield launched


@pytest.fixture
def page(browser: Any, server: Any) -> Iterator[Any]:
    """A new window; at its end nothing was said on the console, and nothing asked of another host."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, said, asked = context.new_page(), [], []
    page.set_default_timeout(15_000)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    yield page
    context.close()
    assert [line for line in said if "400 (Bad Request)" not in line] == []  # what a refusal is told as
    assert {urlsplit(url).netloc for url in asked if not url.startswith("data:")} == {urlsplit(server.url).netloc}


def address(server: Any, **chosen: Any) -> str:
    return f"{server.url}/#" + urlencode(chosen, doseq=True)


def test_two_adapters_write_side_by_side_and_colours_tell_what_they_changed(page: Any, server: Any) -> None:
    page.goto(server.url)
    page.wait_for_selector("input[name=model][value=a1]")
    page.fill("#prompt", "def main(")
    for box in page.query_selector_all("input[name=model]"):
        box.set_checked(box.get_attribute("value") in ("base", "a0", "a1"))
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "12")
    page.click("#run")
    page.wait_for_selector(".column[data-model=a1][data-state=scored]")
    page.wait_for_selector(".column[data-model=a0][data-state=scored]")
    ids = server.bank.encode("def main(")
    for name in ("a0", "a1"):
        asked = {"model": name, "prompt": "def main(", "max_tokens": 12, "temperature": 0, "return_token_ids": True}
        (choice,) = server.post("/v1/completions", **asked).json()["choices"]
        written = page.inner_text(f".column[data-model={name}] .output")
        assert written.replace("\n", "") == ("def main(" + choice["text"]).replace("\n", "")
        text = torch.tensor([ids + choice["token_ids"]])
        nats = [server.bank.logits(text, n)[0].log_softmax(-1) for n in (name, None)]
        token, place = choice["token_ids"][0], len(ids) - 1
        raised = float(nats[0][place, token] - nats[1][place, token])
        first = page.query_selector(f".column[data-model={name}] .token")
        assert float(first.get_attribute("data-nats")) == pytest.approx(raised, abs=2e-3)
        shown = first.get_attribute("class")
        assert ("up-" in shown) == (raised >= 0.41) and ("down-" in shown) == (raised <= -0.41)
    assert page.query_selector(".column[data-model=base] .token[data-nats]") is None


def test_everything_chosen_is_in_the_address_and_comes_back_from_it(page: Any, server: Any) -> None:
    chosen = {
        "prompt": "a <b>&=# é\n", "temperature": "0.35", "top_p": "0.5", "top_k": "7", "repetition_penalty": "1.2",
        "max_tokens": "5", "seed": "4242", "stop": "x\\n", "model": ["a3", "auto"],
    }  # fmt: skip
    page.goto(address(server, **chosen))
    page.wait_for_selector("input[value=a3]:checked")
    for name in set(chosen) - {"model"}:
        assert page.input_value(f"#{name}") == chosen[name], name
    assert page.eval_on_selector_all("input[name=model]:checked", "all => all.map(one => one.value)") == ["auto", "a3"]
    page.fill("#seed", "7")
    said = parse_qsl(page.evaluate("location.hash").lstrip("#"), keep_blank_values=True)
    assert ("seed", "7") in said and ("prompt", chosen["prompt"]) in said and ("model", "auto") in said
    assert "key" not in dict(said)


def test_it_runs_and_stops_by_keyboard_and_a_stop_frees_the_slot(page: Any, server: Any) -> None:
    page.goto(address(server, prompt="x", max_tokens=400, temperature=0, model=["a2"]))
    page.wait_for_selector("input[value=a2]:checked")
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".column .token")
    page.keyboard.press("Escape")
    page.wait_for_selector(".column[data-state=scored]")
    assert "stopped" in page.inner_text(".column .status")
    server.wait(lambda: server.engine.load.running == 0)
    assert 0 < len(page.query_selector_all(".token")) < 400
    page.focus(".output")
    page.keyboard.press("ArrowRight")
    assert page.is_visible("#details")


def test_markup_in_a_prompt_and_in_a_text_stays_text(page: Any, server: Any) -> None:
    page.goto(address(server, prompt="<img src=x onerror=alert(1)>", max_tokens=3, model=["base"]))
    page.wait_for_selector("input[value=base]:checked")
    page.click("#run")
    page.wait_for_selector(".column[data-state=scored]")
    assert page.query_selector("#columns img") is None
    assert "<img src=x onerror=alert(1)>" in page.inner_text(".output")


def test_a_phone_shows_everything_in_its_width(page: Any, server: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto(address(server, prompt="word" * 40, max_tokens=8, model=["base", "a0", "auto"]))
    page.wait_for_selector("input[value=a0]:checked")
    page.click("#run")
    page.wait_for_selector(".column[data-model=auto][data-state=scored]")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert "→" in page.inner_text(".column[data-model=auto] .route")


def test_a_refusal_is_one_line_that_can_be_read(page: Any, server: Any) -> None:
    page.goto(address(server, prompt="x", max_tokens=9999, model=["a0"]))
    page.wait_for_selector("input[value=a0]:checked")
    page.click("#run")
    page.wait_for_selector(".column .problem:not([hidden])")
    assert "this model has 512 positions" in page.inner_text(".column .problem")


def test_characters_of_several_tokens_and_stop_strings_show_the_text_and_no_more(page: Any, server: Any) -> None:
    seen = ""
    for seed in range(3):
        chosen = {"prompt": "日本 😀", "temperature": 100, "top_p": 1, "max_tokens": 60, "seed": seed}
        page.goto("about:blank")
        page.goto(address(server, **chosen, stop="qu\nz\\n", model=["a5"]))
        page.wait_for_selector("input[value=a5]:checked")
        page.click("#run")
        page.wait_for_selector(".column[data-state=scored]")
        (choice,) = server.post("/v1/completions", **chosen, model="a5", stop=["qu", "z\n"]).json()["choices"]
        shown = page.eval_on_selector_all(".token", "all => all.map(one => one.textContent)")
        assert "".join(shown) == choice["text"]
        assert page.query_selector(".token:not([data-nats])") is None
        seen += choice["text"]
    assert not seen.isascii(), "nothing here tested characters of several tokens"


def test_a_key_is_asked_for_and_a_link_survives_it(browser: Any, start: Callable[..., Any], root: Path) -> None:
    with start({"a0": root / "a0", "a1": root / "a1"}, api_key="not-told") as running:
        page = browser.new_page()
        page.set_default_timeout(15_000)
        page.goto(address(running, prompt="x", max_tokens=2, model=["a1"]))
        page.wait_for_selector("#key-row:not([hidden])")
        page.fill("#prompt", "y")
        for key, told in (("wrong", "a wrong API key"), ("not-told", "")):
            page.fill("#key", key)
            page.keyboard.press("Enter")
            sync_api.expect(page.locator("#problem")).to_have_text(told)
        page.wait_for_selector("input[value=a1]:checked")
        assert page.eval_on_selector_all("input[name=model]:checked", "all => all.map(one => one.value)") == ["a1"]
        assert page.input_value("#prompt") == "y"
        page.keyboard.press("Control+Enter")
        page.wait_for_selector(".column[data-state=scored] .token")
        assert "not-told" not in page.evaluate("location.href + JSON.stringify(localStorage) + document.cookie")
        page.close()


def test_auto_stands_beside_base_and_what_is_chosen_is_counted_and_cleared(page: Any, server: Any) -> None:
    page.goto(server.url)
    page.wait_for_selector("input[name=model][value=a1]")
    names = page.eval_on_selector_all("input[name=model]", "all => all.map(one => one.value)")
    assert names[:3] == ["base", "auto", "a0"] and len(names) == 10
    count = page.locator("#count")
    sync_api.expect(count).to_have_text("3 of 10 chosen")
    page.check("input[value=auto]")
    sync_api.expect(count).to_have_text("4 of 10 chosen")
    page.click("#clear")
    sync_api.expect(count).to_have_text("0 of 10 chosen")
    assert page.is_hidden("#clear") and "model=" not in page.evaluate("location.hash")
    page.click("#run")
    sync_api.expect(page.locator("#problem")).to_have_text("Choose at least one model.")


def test_a_seed_of_ten_digits_is_seen_whole(page: Any, server: Any) -> None:
    page.goto(address(server, seed="4294967295", model=["base"]))
    page.wait_for_selector("input[value=base]:checked")
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        page.evaluate("document.getElementById('sampling').open = true")
        assert page.eval_on_selector("#seed", "one => one.scrollWidth <= one.clientWidth"), width


def test_four_columns_stand_side_by_side_on_a_laptop(page: Any, server: Any) -> None:
    page.set_viewport_size({"width": 1440, "height": 900})
    models = ["base", "auto", "a0", "a1"]
    page.goto(address(server, prompt="x", max_tokens=4, model=models))
    page.wait_for_selector("input[value=a1]:checked")
    page.click("#run")
    for name in models:
        page.wait_for_selector(f".column[data-model={name}][data-state=scored]")
    tops = page.eval_on_selector_all(".column", "all => all.map(one => one.getBoundingClientRect().top)")
    assert len(tops) == 4 and len(set(tops)) == 1
    told = page.inner_text(".column[data-model=a0] .note")
    assert "On average a token is" in told and "than under the base" in told


def test_details_leave_run_free_on_a_phone(browser: Any, server: Any) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 700}, has_touch=True)
    page = context.new_page()
    page.set_default_timeout(15_000)
    page.goto(address(server, prompt="def main(", max_tokens=8, temperature=0, model=["a0"]))
    page.wait_for_selector("input[value=a0]:checked")
    page.click("#run")
    page.wait_for_selector(".column[data-model=a0][data-state=scored]")
    page.tap(".token")
    details, run = page.locator("#details").bounding_box(), page.locator("#run").bounding_box()
    assert details["height"] > 50 and details["y"] + details["height"] <= run["y"]
    context.close()


def test_a_conversation_goes_on_with_what_was_said(page: Any, server: Any) -> None:
    page.goto(address(server, prompt="hello", mode="chat", max_tokens=6, temperature=0, seed=1, model=["a7", "base"]))
    page.wait_for_selector("input[value=a7]:checked")
    shown = page.eval_on_selector_all("input[name=model]:enabled", "all => all.map(one => one.value)")
    assert shown == ["auto", "a7"] and page.is_hidden("input[value=base]")
    sync_api.expect(page.locator("#count")).to_have_text("1 of 2 chosen")
    messages: list[dict[str, str]] = []
    for said in ("hello", "and then?"):
        page.fill("#prompt", said)
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("body:not([data-running]) .column[data-state=scored]")
        sync_api.expect(page.locator("#prompt")).to_have_value("")
        messages.append({"role": "user", "content": said})
        asked = {"model": "a7", "messages": messages, "max_tokens": 6, "temperature": 0, "seed": 1, "top_p": 0.95}
        (choice,) = server.post("/v1/chat/completions", **asked).json()["choices"]
        messages.append({"role": "assistant", "content": choice["message"]["content"]})
        shown_text = page.eval_on_selector(".output", "one => one.textContent")
        names = {"user": "You", "assistant": "Model"}
        assert shown_text == "\n\n".join(f"{names[one['role']]}: {one['content']}" for one in messages)
    page.click("#forget")
    assert page.query_selector(".column") is None
    page.check("input[value=text]")
    assert page.is_visible("input[value=base]")


def test_a_server_that_is_gone_or_stops_is_told_in_one_line(browser: Any, start: Callable[..., Any]) -> None:
    page = browser.new_page()
    page.set_default_timeout(15_000)
    with start({}) as running:
        page.goto(address(running, prompt="x", max_tokens=2, model=["base"]))
        page.wait_for_selector("input[value=base]:checked")
        running.service.draining = True
        page.click("#run")
        page.wait_for_selector(".column .problem:not([hidden])")
        assert "stopping" in page.inner_text(".column .problem") and "(in " in page.inner_text(".column .problem")
        running.service.draining = False
    page.click("#run")
    page.wait_for_selector(".column .problem:not([hidden])")
    assert page.inner_text(".column .problem") == "The server cannot be reached. Is peftune serve still running?"
    page.click("#refresh")
    sync_api.expect(page.locator("#problem")).to_have_text(
        "The server cannot be reached. Is peftune serve still running?"
    )
    page.close()
