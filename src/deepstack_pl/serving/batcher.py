"""Questions of many clients to one model: what waits and has the same settings is answered as one batch."""

import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from deepstack_pl.serving.session import Answer, Question, Session


class Full(Exception):
    """As many requests wait as may."""


@dataclass(kw_only=True, slots=True, eq=False)
class Waiting:
    """A question on its way.

    ``hear`` gets text, ``done`` the answer or what went wrong, once; both are called by the worker and must not wait.
    """

    question: Question
    hear: Callable[[str], None]
    done: Callable[[Answer | Exception], None]
    given_up: threading.Event = field(default_factory=threading.Event)
    heard: bool = False

    def say(self, text: str) -> None:
        """Hand a piece of the answer on; from then on it cannot begin anew."""
        self.heard = True
        self.hear(text)

    def give_up(self) -> None:
        """Nobody listens any more: its answer ends at the next token, or never begins."""
        self.given_up.set()


class Batcher:
    """One thread that answers, up to ``batch`` questions at a time; at most ``queue`` requests wait for it, those that
    are given up not counted.

    A request takes its place before its body is read, so that bodies in memory are bounded, too.
    """

    def __init__(self, session: Session, *, batch: int, queue: int) -> None:
        self._session, self._batch, self._queue = session, batch, queue
        self._waiting: deque[Waiting] = deque()
        self._answering: list[Waiting] = []
        self._reading = 0
        self._changed = threading.Condition()
        self._closed = False
        self._threads = torch.get_num_threads()  # torch's own choice for another thread may be another
        self._worker = threading.Thread(target=self._work, name="answers", daemon=True)
        self._worker.start()

    @property
    def waiting(self) -> int:
        """Requests that have a place in the queue: read, or being read."""
        with self._changed:
            return self._places()

    @property
    def answering(self) -> int:
        """Questions of the batch that is being answered."""
        with self._changed:
            return len(self._answering)

    @property
    def alive(self) -> bool:
        return self._worker.is_alive()

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue for a request whose question is still to be read.

        Raises:
            Full: there is none.
        """
        with self._changed:
            if self._closed or self._places() >= self._queue:
                raise Full
            self._reading += 1
        try:
            yield
        finally:
            with self._changed:
                self._reading -= 1

    def submit(self, waiting: Waiting) -> None:
        """Put a question into the queue; who calls has a `place`."""
        with self._changed:
            if self._closed:
                raise Full
            self._waiting.append(waiting)
            self._changed.notify()

    def close(self) -> None:
        """Give up all questions and end the thread."""
        with self._changed:
            self._closed = True
            for waiting in [*self._waiting, *self._answering]:
                waiting.give_up()
            self._changed.notify()
        self._worker.join(timeout=30)

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        while batch := self._next():
            outcomes = self._outcomes(batch)
            if len(batch) > 1 and isinstance(failed := outcomes[0], Exception):
                # One too many for the memory, or one that the model stumbles over: the others need not fail with it.
                traceback.clear_frames(failed.__traceback__)  # they hold the batch's tensors
                again = [waiting for waiting in batch if not waiting.heard]
                print(
                    f"{len(batch)} questions failed together ({type(failed).__name__}): the {len(again)} of which "
                    "nothing was heard yet are answered one by one.",
                    file=sys.stderr,
                )
                for waiting in [waiting for waiting in batch if waiting.heard]:
                    self._done(waiting, failed)
                for waiting in again:
                    self._done(waiting, *self._outcomes([waiting]))
            else:
                for waiting, outcome in zip(batch, outcomes, strict=True):
                    self._done(waiting, outcome)

    def _outcomes(self, batch: list[Waiting]) -> list[Answer] | list[Exception]:
        try:
            return self._session.answer(
                [waiting.question for waiting in batch],
                [waiting.say for waiting in batch],
                [waiting.given_up.is_set for waiting in batch],
            )
        except Exception as error:  # whatever a model stumbles over: its clients hear of it, and others are served
            return [error] * len(batch)

    def _done(self, waiting: Waiting, outcome: Answer | Exception) -> None:
        with self._changed:
            self._answering.remove(waiting)
        waiting.done(outcome)

    def _places(self) -> int:
        """How many are taken, once what is given up has left the queue: else who asks and leaves would fill it."""
        for waiting in [each for each in self._waiting if each.given_up.is_set()]:
            self._waiting.remove(waiting)
            waiting.done(Answer("", "cancelled", len(waiting.question.sample.input_ids), 0))
        return len(self._waiting) + self._reading

    def _next(self) -> list[Waiting]:
        """The question that waits longest and, where it is greedy, those that can be answered with it; nothing at the
        end.
        """
        with self._changed:
            while True:
                self._places()
                if self._waiting or self._closed:
                    break
                self._changed.wait()
            if self._closed:
                return []
            settings = self._waiting[0].question.settings
            same = [each for each in self._waiting if each.question.settings == settings]
            batch = same[: 1 if settings.sampled else self._batch]
            for waiting in batch:
                self._waiting.remove(waiting)
            self._answering = [*batch]
            return batch
