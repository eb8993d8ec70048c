"""Tokens to text while they come: row by row of a batch, no half characters, nothing of what ends an answer."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

HALF = "\ufffd"  # what bytes decode to that are no character, or not yet one


class Row:
    """One answer as it is written.

    ``hear`` gets its text piece by piece; the pieces joined are ``text``. White space around an answer is left out, as
    evaluation leaves it out. A row ends with one of the tokens ``ends``, with a string of ``stop`` (which is left out),
    after ``most`` tokens, or when ``cancelled`` says so.

    Attributes:
        finish: why it ended (``stop``, ``length``, ``cancelled``); None while it is written.
        tokens: that were written, the one that ended it included.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ends: Collection[int],
        *,
        stop: Sequence[str],
        most: int,
        hear: Callable[[str], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self._tokenizer, self._ends, self._stop = tokenizer, ends, tuple(stop)
        self._most, self._hear, self._cancelled = most, hear, cancelled
        self._ids: list[int] = []
        self._said = 0  # characters of the decoded answer that are settled: heard, or space before the first word
        self.text = ""
        self.finish: str | None = None

    @property
    def tokens(self) -> int:
        return len(self._ids)

    def write(self, token: int) -> None:
        """One more token; none after the end."""
        if self.over():
            return
        self._ids.append(token)
        ended = token in self._ends
        text = self._decode(self._ids[:-1] if ended else self._ids)
        places = [place for place in map(text.rstrip(HALF).find, self._stop) if place >= 0]
        if places:
            text = text[: min(places)]
        if ended or places:
            self.finish = "stop"
        elif len(self._ids) >= self._most:
            self.finish = "length"
        self._say(text)

    def over(self) -> bool:
        """Whether it has ended; asks whether anybody still listens."""
        if self.finish is None and self._cancelled():
            self.finish = "cancelled"
        return self.finish is not None

    def _decode(self, ids: list[int]) -> str:
        # The whole answer each time: what a token says may depend on all before it. Spaces stay as they were written:
        # a clean-up would change text that was heard already.
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str), "one row of ids is one string"
        return text

    def _say(self, text: str) -> None:
        """Hand out what no later token can change."""
        if not self.text:
            self._said = len(text) - len(text.lstrip())
        settled = len(text.rstrip()) if self.finish else self._settled(text)
        new = text[self._said : settled]
        if new:
            self._said = settled
            self.text += new
            self._hear(new)

    def _settled(self, text: str) -> int:
        """How much of ``text`` stays whatever comes: not a half character, the beginning of a stop string, nor space
        that may turn out to be the last.
        """
        text = text.rstrip(HALF)
        begun = (
            size
            for stop in self._stop
            for size in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:size])
        )
        return len(text[: len(text) - max(begun, default=0)].rstrip())


class Streamer(BaseStreamer):
    """What ``generate`` hands tokens to: the prompt first, then one token a row and step."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        self._prompt = True

    def put(self, value: Tensor) -> None:
        if self._prompt:
            self._prompt = False
            return
        for row, token in zip(self._rows, value.tolist(), strict=True):
            row.write(token)

    def end(self) -> None:
        """Nothing is held back after a row's end."""


class Ended(StoppingCriteria):
    """Ends rows that say that they are over, though their last token does not."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Any:
        return torch.tensor([row.over() for row in self._rows], device=input_ids.device)
