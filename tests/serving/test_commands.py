"""``deepstack chat`` and ``deepstack serve``, as they are typed."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from served import a_run, asked, picture, record
from small_run import Pages

from deepstack_pl.batch import Record, Role, Turn
from deepstack_pl.cli.main import main
from deepstack_pl.serving import talk
from deepstack_pl.serving.config import Settings
from deepstack_pl.serving.session import Answer, Session

ENTRY = "from deepstack_pl.cli.main import entry; entry()"
SOURCE = str(Path(__file__).parents[2] / "src")
Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = a_run(tmp_path_factory.mktemp("runs") / "tiny", endless=True)
    for number in (0, 1):
        picture(number).save(folder.parent / f"page{number}.png")
    return folder


@pytest.fixture
def typed(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """``deepstack chat RUN WORDS`` with ``lines`` as its input: status, what it printed, and what it complained of."""
    monkeypatch.chdir(run.parent)

    def type_it(*words: str, lines: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        status = main(["chat", str(run), "--max-tokens", "12", "--device", "cpu", *words])
        return status, *capsys.readouterr()

    return type_it


def answer(run: Path, asked: Record, injections: bool = True) -> str:
    session = Session.load(run, "cpu")
    question = session.question(asked, max_tokens=12, settings=Settings(injections=injections))
    (found,) = session.answer([question])
    return found.text + (" [cut after 12 tokens]" if found.finish == "length" else "")


def test_one_question_is_answered_with_its_pictures(run: Path, typed: Typed) -> None:
    words = ("--image", "page0.png", "--image", "page1.png", "--prompt", "Which colours?")
    both = Record(
        key="both", turns=(Turn(Role.user, "<image>\n<image>\nWhich colours?"),), images=(picture(0), picture(1))
    )
    assert typed(*words) == (0, f"{answer(run, both)}\n", "")
    assert typed(*words, "--no-injection") == (0, f"{answer(run, both, injections=False)}\n", "")
    assert typed(*words, "--temperature", "1", "--seed", "3") == typed(*words, "--temperature", "1", "--seed", "3")


def test_each_line_of_the_input_is_a_turn(run: Path, typed: Typed) -> None:
    lines = (
        "/image page0.png\nWhich colours?\n\nReally?\n/injections off\n/reset\n/image page0.png\ngold\n/quit\nnot asked"
    )
    status, out, err = typed(lines=lines)
    first = record("Which colours?", picture())
    one = answer(run, first)
    said = Turn(Role.assistant, one.removesuffix(" [cut after 12 tokens]"))
    two = answer(run, Record(key="2", turns=(*first.turns, said, Turn(Role.user, "Really?")), images=first.images))
    three = answer(run, record("gold", picture()), injections=False)
    assert (status, out) == (0, f"{one}\n{two}\n{three}\n")
    assert err == "[1 of the next question]\n[injections off]\n[begun anew]\n[1 of the next question]\n"


def test_what_cannot_be_answered_is_a_sentence_and_the_talk_goes_on(run: Path, typed: Typed) -> None:
    (run.parent / "text.png").write_text("no picture")
    lines = "/image none.png\n/image text.png\n/shout\n/injections maybe\n<image> what?\ngold"
    status, out, err = typed(lines=lines)
    assert (status, out) == (1, f"{answer(run, record('gold'))}\n")
    sentences = err.strip().splitlines()
    assert [*map(bool, map(re.search, (
        "none.png: there is no such file", "text.png: cannot read this image", "/shout: there is no such command",
        "/injections maybe: there is no such", "<image> is where a picture goes, and no word: give",
    ), sentences))] == [True] * 5  # fmt: skip


def test_an_answer_that_spells_a_placeholder_does_not_break_the_next_turn(
    run: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Session.answer

    def spelling(*args: Any) -> list[Answer]:
        return [replace(each, text=f"{each.text} <image>") for each in right(*args)]

    monkeypatch.setattr(Session, "answer", spelling)
    status, out, err = typed("--image", "page0.png", lines="Which colours?\nReally?\nAgain?")
    assert (status, out.count("[cut after 12 tokens]"), err) == (0, 3, "")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--prompt", " "), "--prompt is empty"),
        (("--image", "none.png"), "none.png: there is no such file"),
        (("--temperature", "9"), "temperature=9.0: must be 0"),
        (("--max-tokens", "0"), "--max-tokens 0: an answer has at least 1"),
        (("--device", "toaster"), "--device toaster"),
    ],
)
def test_what_cannot_begin_is_refused_in_a_sentence(typed: Typed, words: tuple[str, ...], why: str) -> None:
    status, out, err = typed(*words)
    assert (status, out, why in err, err.count("\n")) == (1, "", True, 1)


def test_a_folder_without_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("chat", "serve"):
        assert main([command, str(tmp_path)]) == 1
        assert "no model lies there" in capsys.readouterr().err


def test_ctrl_c_stops_the_answer_alone(run: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    before, shown = signal.getsignal(signal.SIGINT), talk._show

    def show_and_stop(text: str) -> None:
        shown(text)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(talk, "_show", show_and_stop)
    status, out, _ = typed(lines="gold\nred teal")
    assert (status, out.count("[stopped]"), len(out.splitlines())) == (0, 2, 2)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--queue", "0"), "queue=0: a limit must be at least 1"),
        (("--image-root", "nowhere"), "--image-root nowhere: there is no such folder"),
        (("--host", "192.0.2.1", "--port", "0"), "--host 192.0.2.1 --port 0: "),
    ],
)
def test_a_server_that_cannot_begin_says_so(
    run: Path, words: tuple[str, ...], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(run), *words]) == 1
    assert why in capsys.readouterr().err


def test_without_its_extra_it_says_what_to_install(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # as if it were not there
    assert main(["serve", str(run)]) == 1
    assert capsys.readouterr().err == "deepstack serve needs uvicorn: pip install -e .[serve]\n"


def test_an_address_that_others_reach_is_warned_of(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(run), "--host", "192.0.2.1"]) == 1  # nobody's: it cannot be bound
    assert "there is no authentication and no encryption" in capsys.readouterr().err


@pytest.mark.slow
def test_on_a_terminal_it_asks_with_a_prompt_line_and_ctrl_c_and_ctrl_d_do_what_they_do_everywhere(run: Path) -> None:
    control, terminal = pty.openpty()
    owning = f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); {ENTRY}"  # so that ^C there reaches it
    words = [sys.executable, "-c", owning, "chat", str(run), "--max-tokens", "400", "--device", "cpu"]
    process = subprocess.Popen(
        words, stdin=terminal, stdout=terminal, stderr=terminal, cwd=run.parent, start_new_session=True,
        env=os.environ | {"PYTHONPATH": SOURCE, "TERM": "dumb", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.close(terminal)
    seen = ""

    def until(pattern: str) -> None:
        nonlocal seen
        end = time.monotonic() + 60
        while not re.search(pattern, seen):
            assert time.monotonic() < end, seen
            if select.select([control], [], [], 1)[0]:
                seen += os.read(control, 4096).decode(errors="replace")
        seen = seen[re.search(pattern, seen).end() :]  # pyright: ignore[reportOptionalMemberAccess]

    until(r"tiny, plan \w+, 4 injections .*\r\n> ")
    os.write(control, b"half a line")
    until("half a line")
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
        time.sleep(0.01)  # readline takes a signal only while it waits for a key: until the next one, else
    os.write(control, b"\x03")
    until(r"\r\n> ")
    os.write(control, b"/image page0.png\n")
    until(r"\[1 of the next question\]\r\n> ")
    os.write(control, b"Which colours?\n")
    until(r"\r\n.")
    os.write(control, b"\x03")
    until(r"\[stopped\]\r\n> ")
    os.write(control, b"\x04")
    assert process.wait(timeout=20) == 0
    os.close(control)


@pytest.mark.slow
def test_a_server_is_asked_by_its_address_and_ends_with_ctrl_c(run: Path) -> None:
    words = [sys.executable, "-c", ENTRY, "serve", str(run), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=run.parent,
        env=os.environ | {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    lines = [process.stdout.readline(), process.stdout.readline()]
    assert re.match(r"tiny on cpu, plan \w+\n", lines[0])
    address = re.search(r"page: (http://127\.0\.0\.1:\d+)/ ", lines[1])
    assert address is not None, lines
    body = json.dumps(asked(Pages()[0].turns[0].text.removeprefix("<image>"), max_tokens=5)).encode()
    request = urllib.request.Request(f"{address[1]}/v1/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        assert json.loads(reply.read())["usage"]["completion_tokens"] <= 5
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "stopped by Ctrl-C\n")
