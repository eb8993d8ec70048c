"""A conversation on the terminal."""

import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from PIL import Image

from deepstack_pl.batch import Record, Role, Turn
from deepstack_pl.language.template import IMAGE
from deepstack_pl.serving.config import Settings
from deepstack_pl.serving.session import Session
from deepstack_pl.vision.images import decode_image

_COMMANDS = "/image FILE, /injections on|off, /reset, /quit"
# What a model writes must not move the cursor or retitle the window: control characters, but for tab and line break.
_CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


class Talk:
    """Turns with one model. Questions without an answer leave no trace in it."""

    def __init__(self, session: Session, settings: Settings, max_tokens: int, pictures: list[Image.Image]) -> None:
        self._session, self._settings, self._max_tokens = session, settings, max_tokens
        self._next = pictures  # of the next question
        self._turns: list[Turn] = []
        self._pictures: list[Image.Image] = []

    def run(self) -> int:
        """Read questions and commands to the end of the input; the exit status."""
        watched = sys.stdin.isatty()
        if watched:
            plan = self._session.plan
            print(f"{self._session.name}, plan {plan.digest}, {len(plan.injections)} injections   ({_COMMANDS})")
        failed = 0
        for line in _lines(watched):
            if line == "/quit":
                break
            if line:
                failed |= self._command(line) if re.match(r"/[a-z]+(\s|$)", line) else self.ask(line)
        return 0 if watched else failed

    def ask(self, text: str) -> int:
        """Ask, and print the answer while it is written; the exit status."""
        if IMAGE in text:
            return _complain(f"{IMAGE} is where a picture goes, and no word: give pictures with /image, or reword it.")
        stopped = threading.Event()
        asked = Turn(Role.user, "\n".join([IMAGE] * len(self._next) + [text.strip()]))
        record = Record(
            key="chat", turns=(*self._turns, asked), images=(*self._pictures, *self._next), source="terminal"
        )
        with _ctrl_c_sets(stopped):
            try:
                question = self._session.question(record, max_tokens=self._max_tokens, settings=self._settings)
            except ValueError as error:
                return _complain(str(error))
            (answer,) = self._session.answer([question], [_show], [stopped.is_set])
        print({"length": f" [cut after {answer.tokens} tokens]", "cancelled": " [stopped]"}.get(answer.finish, ""))
        self._turns += [asked, Turn(Role.assistant, answer.text, plain=True)]
        self._pictures += self._next
        self._next = []
        return 0

    def _command(self, line: str) -> int:
        name, _, rest = line.partition(" ")
        match name, rest.strip():
            case "/image", str(file) if file:
                try:
                    self._next.append(read_picture(Path(file).expanduser()))
                except ValueError as error:
                    return _complain(str(error))
                return _say(f"{len(self._next)} of the next question")
            case "/reset", "":
                self._turns, self._pictures, self._next = [], [], []
                return _say("begun anew")
            case "/injections", "on" | "off" as state:
                self._settings = replace(self._settings, injections=state == "on")
                return _say(f"injections {state}")
            case _:
                return _complain(f"{line}: there is no such command. There are {_COMMANDS}.")


def read_picture(file: Path) -> Image.Image:
    """The picture in ``file``.

    Raises:
        ValueError: it is not there, or cannot be read.
    """
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file.")
    return decode_image(file.read_bytes(), str(file))


def _lines(watched: bool) -> Iterator[str]:
    """The lines of the input, asked for with a prompt where somebody sits; Ctrl-C drops the one that is written."""
    if watched:
        import readline  # noqa: F401 - input() then edits lines and remembers them
    while True:
        try:
            yield (input("> ") if watched else input()).strip()
        except KeyboardInterrupt:
            if not watched:
                raise
            print()
        except EOFError:
            if watched:
                print()
            return


@contextmanager
def _ctrl_c_sets(stopped: threading.Event) -> Iterator[None]:
    before = signal.signal(signal.SIGINT, lambda *_: stopped.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _show(text: str) -> None:
    sys.stdout.write(text.translate(_CONTROL) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _say(text: str) -> int:
    print(f"[{text}]", file=sys.stderr)
    return 0


def _complain(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 1
