"""LLaVA's JSON file, one list of records, read record by record: a file of gigabytes is never in memory whole."""

import codecs
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from deepstack_pl.batch import Reason, Refused

CHUNK = 2**24
_SPACE = " \t\r\n"


class Row(NamedTuple):
    """One record: what it holds, and where its own bytes stand in the file.

    Attributes:
        no_json: what in it JSON does not know, such as NaN; "" where there is nothing.
    """

    number: int
    start: int
    size: int
    values: dict[str, Any]
    no_json: str

    def check(self, key: str) -> None:
        """Refuse a record that other readers of JSON would refuse."""
        if self.no_json:
            says = f"{key}: holds {self.no_json}, which is no JSON. Write null, or leave the value out."
            raise Refused(Reason.conversation, says)


class JsonList:
    """The records of a file; ``sha256`` is that of its bytes once they are all read."""

    def __init__(self, path: Path, chunk: int = CHUNK) -> None:
        if not path.is_file():
            raise ValueError(f"data.path={path} is not there. Name a JSON file in LLaVA's format.")
        self.path, self.chunk = path, chunk
        self.size = path.stat().st_size
        self.sha256 = ""

    def __iter__(self) -> Iterator[Row]:
        """Every record, in order.

        Raises:
            ValueError: the file is no list of records, at least one, in UTF-8; names the place.
        """
        odd: list[str] = []

        def note(word: str) -> None:
            odd.append(word)

        decode = json.JSONDecoder(parse_constant=note).raw_decode
        digest, number = hashlib.sha256(), 0
        with self.path.open("rb") as file:
            text = _Text(self, file, digest)
            if text.next() != "[":
                raise self.no_list(f"it starts with {text.next()!r}")
            text.skip()
            last = text.next()
            while last != "]":
                start, at = text.offset, text.at
                while True:
                    odd.clear()
                    try:
                        values, end = decode(text.held, text.at)
                        break
                    except json.JSONDecodeError as error:  # the rest of it may still be to come
                        cut = error.pos >= len(text.held) - 16 or error.msg.startswith("Unterminated")
                        if not cut or not text.more():
                            place = start + len(text.held[at : error.pos].encode(errors="replace"))
                            says = f"record {number}, about byte {place}: {error.msg}"
                            raise ValueError(f"data.path={self.path} is no JSON ({says}).{_FORMAT}") from error
                    except RecursionError as error:
                        raise self.no_list(f"record {number} is nested too deep") from error
                if not isinstance(values, dict):
                    raise self.no_list(f"record {number} is {str(values)[:40]!r}")
                size = text.go_on(end)
                yield Row(number, start, size, values, odd[0] if odd else "")
                number += 1
                last = text.next()
                if last == ",":
                    text.skip()
                    if text.next() == "]":
                        raise self.no_list(f"a comma after record {number - 1}, and then nothing")
                elif last != "]":
                    raise self.no_list(f"{last!r} after record {number - 1}" if last else "it is cut off")
            text.skip()
            if text.next():
                raise self.no_list(f"{text.next()!r} after its end")
        if not number:
            raise self.no_list("it is empty")
        self.sha256 = digest.hexdigest()

    def no_list(self, found: str) -> ValueError:
        """The error that says what LLaVA's format is."""
        return ValueError(f"data.path={self.path} is not a list of records, at least one: {found}.{_FORMAT}")


_FORMAT = ' LLaVA\'s format is [{"id": ..., "image": ..., "conversations": [...]}, ...], in UTF-8.'


class _Text:
    """A window on the file's text that knows the byte at which it stands."""

    def __init__(self, source: JsonList, file: Any, digest: Any) -> None:
        self._source, self._file, self._digest = source, file, digest
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._ended = False
        self._chunk = source.chunk
        self.held, self.at, self.offset = "", 0, 0
        while not self.held and self.more():
            pass
        if self.held.startswith("\ufeff"):
            self.go_on(1)

    def more(self) -> bool:
        """Read on; False at the end. It grows with a record that does not fit."""
        if self._ended:
            return False
        data = self._file.read(self._chunk)
        self._digest.update(data)
        self._ended = not data
        try:
            text = self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            place = self._file.tell() - len(data) + error.start
            raise self._source.no_list(f"it is not UTF-8 ({error.reason}, about byte {place})") from error
        kept = len(self.held) - self.at
        self.held, self.at = self.held[self.at :] + text, 0
        self._chunk = max(self._source.chunk, kept * 3)
        return True

    def next(self) -> str:
        """The next character that is no space, "" at the end; stays there."""
        while True:
            at = self.at
            while at < len(self.held) and self.held[at] in _SPACE:
                at += 1
            self.offset += at - self.at
            self.at = at
            if at < len(self.held):
                return self.held[at]
            if not self.more():
                return ""

    def skip(self) -> None:
        """Past one character of one byte."""
        self.at += 1
        self.offset += 1

    def go_on(self, end: int) -> int:
        """To ``end`` of what is held; the bytes that were passed."""
        passed = self.held[self.at : end]
        size = len(passed) if passed.isascii() else len(passed.encode())
        self.at, self.offset = end, self.offset + size
        return size
