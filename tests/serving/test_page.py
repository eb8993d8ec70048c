"""The page in a browser: what it shows is what the API says."""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
from served import a_session, asked, data_uri, picture, png, running

from deepstack_pl.serving.config import Limits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        browser.CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome is on the PATH"
    ),
]
QUESTION, AGAIN = "Name the weaves in reading order.", "Really?"
ANSWERS = "[...document.querySelectorAll('.turn:last-child .answer')]"
FIGURE = "document.getElementById('dealt_figure')"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running(a_session(), Limits(tokens=16)) as address:
        yield address


@pytest.fixture
def page(server: str, tmp_path: Path) -> Iterator[browser.Page]:
    (tmp_path / "page.png").write_bytes(png(picture()))
    with browser.opened(tmp_path) as tab:
        tab.call("Page.navigate", url=f"{server}/")
        tab.until("document.getElementById('model')?.textContent === 'tiny'")
        yield tab


def api(server: str, *turns: str, injections: bool) -> str:
    """What the API answers to the same picture and turns, questions and answers in turn."""
    body = asked(turns[0], data_uri(png(picture())), injections=injections)
    for place, turn in enumerate(turns[1:]):
        role = "user" if place % 2 else "assistant"
        body["messages"].append({"role": role, "content": turn})
    request = urllib.request.Request(
        f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())["choices"][0]["message"]["content"]


def show(page: browser.Page, file: Path) -> None:
    """Add a picture, and wait for its figure."""
    page.choose("#file", file)
    page.until("document.querySelectorAll('#pictures img').length === 1")


def ask(page: browser.Page, question: str, mode: str) -> dict[str, Any]:
    """The answers that stand there at the end: by title."""
    page.run(f"document.querySelector('input[value={mode}]').click()")
    page.run("document.getElementById('question').focus()")
    turns = page.run("document.querySelectorAll('.turn').length")
    page.type_and_enter(question)
    page.until(f"document.querySelectorAll('.turn').length === {turns + 1}")
    page.until("!document.getElementById('send').hidden")
    titled = f"{ANSWERS}.map(card => [card.querySelector('h2').textContent, card.querySelector('.text').textContent])"
    return dict(page.run(titled))


def test_a_browser_shows_the_apis_answers_with_injections_without_and_side_by_side(
    page: browser.Page, server: str, tmp_path: Path
) -> None:
    right = {
        "with injections": api(server, QUESTION, injections=True),
        "without injections": api(server, QUESTION, injections=False),
    }
    assert right["with injections"] != right["without injections"]
    for mode, titles in (("on", ["with injections"]), ("off", ["without injections"]), ("both", [*right])):
        show(page, tmp_path / "page.png")
        assert ask(page, QUESTION, mode) == {title: right[title] for title in titles}
        if mode != "both":
            page.run("document.getElementById('anew').click()")
            assert page.run("document.querySelectorAll('.turn').length") == 0
    second = {  # each side goes on with its own answer
        title: api(server, QUESTION, right[title], AGAIN, injections=title == "with injections") for title in right
    }
    assert ask(page, AGAIN, "both") == second
    assert page.run("document.getElementById('wrong').hidden")
    assert page.errors == []


def test_a_browser_shows_the_dealt_picture_and_what_is_no_picture_is_a_sentence(
    page: browser.Page, tmp_path: Path
) -> None:
    assert page.run(f"{FIGURE}.checkVisibility()") is False
    show(page, tmp_path / "page.png")
    assert page.run(f"{FIGURE}.src").startswith("data:image/png;base64,")
    page.until(f"{FIGURE}.checkVisibility() && {FIGURE}.naturalWidth > 100")
    assert "<- group 3" in page.run("document.getElementById('plan_text').textContent")
    assert page.errors == []
    (tmp_path / "text.png").write_text("no picture")
    page.choose("#file", tmp_path / "text.png")
    page.until("!document.getElementById('wrong').hidden")
    assert "cannot read this image" in page.run("document.getElementById('wrong').textContent")
    assert page.run("document.querySelectorAll('#pictures img').length") == 1
    page.until(f"{FIGURE}.checkVisibility()")
    assert ["400" in error for error in page.errors] == [True], (
        "the console names the refused request, and all is heard"
    )
