"""A tiny model with random weights that has much to say, and a server around it."""

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn
from PIL import Image
from small_run import STACKED, TALKATIVE, Pages, small_model, small_processor

from deepstack_pl.batch import Record, Role, Turn
from deepstack_pl.serving.api import make_app
from deepstack_pl.serving.config import Limits
from deepstack_pl.serving.session import Session
from deepstack_pl.stacking.config import ModelConfig

WORDS = ("red teal", "Which colours?", "Name the weaves in reading order.", "gold", "What is left of the navy one?")


def a_session(plan: ModelConfig = STACKED, *, endless: bool = False) -> Session:
    """``endless``: its answers end at their limit alone."""
    model, processor = small_model(plan, TALKATIVE), small_processor(plan)
    if endless:
        with torch.no_grad():
            model.get_output_embeddings().weight[processor.tokenizer.eos_token_id] = 0  # pyright: ignore
    return Session(model, processor, "tiny")


def a_run(folder: Path, *, endless: bool = False) -> Path:
    session = a_session(endless=endless)
    session.model.save_pretrained(folder)
    session.processor.save_pretrained(folder)
    return folder


def picture(number: int = 0) -> Image.Image:
    return Pages()[number].images[0]


def record(text: str, *pictures: Image.Image) -> Record:
    return Record(key="test", turns=(Turn(Role.user, "<image>\n" * len(pictures) + text),), images=pictures)


def records() -> list[Record]:
    """Of many lengths: with no picture, one and two, and of several turns."""
    found = [record(text) for text in WORDS]
    found += [record(text, picture(place)) for place, text in enumerate(WORDS)]
    found.append(record("Which differ?", picture(1), picture(2)))
    first = record("Which colours?", picture(3))
    again = (*first.turns, Turn(Role.assistant, "red gold"), Turn(Role.user, "Really?"))
    return [*found, Record(key="again", turns=again, images=first.images)]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def data_uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def asked(text: str, *urls: str, **more: Any) -> dict[str, Any]:
    """A request's body."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls] + [{"type": "text", "text": text}]
    return {"model": "tiny", "messages": [{"role": "user", "content": parts}], **more}


class Slow(Session):
    """Takes its time with every piece of text, and counts its batches."""

    pause = 0.02

    def __init__(self, session: Session) -> None:
        super().__init__(session.model, session.processor, session.name)
        self.batches: list[int] = []

    def answer(self, questions: Any, hear: Any = None, cancelled: Any = None) -> Any:
        self.batches.append(len(questions))

        def slowly(own: Any) -> Any:
            return lambda text: (time.sleep(self.pause), own(text))

        return super().answer(questions, [slowly(own) for own in hear], cancelled)


@contextmanager
def running(session: Session, limits: Limits | None = None, root: Path | None = None) -> Iterator[str]:
    """A server in a thread, on a port that is free; its address."""
    app = make_app(session, limits or Limits(), root=root)
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_level="error", server_header=False, ws="none", timeout_graceful_shutdown=2)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def until(true: Any, seconds: float = 20) -> None:
    """Wait for it."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
