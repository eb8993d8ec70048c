"""OpenAI's chat API over one model, and what the page asks for besides."""

import asyncio
import base64
import io
import json
import sys
import time
import traceback
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from matplotlib.figure import Figure
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from deepstack_pl.inspection.dealt import dealt_figure
from deepstack_pl.inspection.plots import plan_figure
from deepstack_pl.serving.asked import read_request
from deepstack_pl.serving.batcher import Batcher, Full, Waiting
from deepstack_pl.serving.config import Limits
from deepstack_pl.serving.guard import Guard, read_body, read_json, refused
from deepstack_pl.serving.page import PAGE, POLICY
from deepstack_pl.serving.pictures import bytes_of, decoded
from deepstack_pl.serving.replies import Completion, Refusal
from deepstack_pl.serving.session import Answer, Question, Session

_LEFT = 499  # nobody is there to read it


def make_app(session: Session, limits: Limits, *, host: str = "127.0.0.1", root: Path | None = None) -> FastAPI:
    """The whole server but for its socket; ``host`` is what clients may call it besides localhost.

    Its worker ends with the application's lifespan.
    """
    service = _Service(session, limits, root)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    # No pages of FastAPI's own: they load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, host=host)
    app.add_exception_handler(Refusal, _refusal)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _failure)
    app.add_api_route("/", service.page, methods=["GET"])
    app.add_api_route("/health", service.health, methods=["GET"])
    app.add_api_route("/v1/models", service.models, methods=["GET"])
    app.add_api_route("/v1/models/{name}", service.model, methods=["GET"])
    app.add_api_route("/v1/chat/completions", service.completions, methods=["POST"])
    app.add_api_route("/v1/deepstack/dealt", service.dealt, methods=["POST"])
    return app


class _Service:
    def __init__(self, session: Session, limits: Limits, root: Path | None) -> None:
        self._session, self._limits, self._root = session, limits, root
        self._batcher = Batcher(session, batch=limits.batch, queue=limits.queue)
        self._since = int(time.time())
        # Requests are read beside the loop, which has others to serve. One request's pictures are decoded at a time,
        # and figures beside it: 64 million pixels are 192 MB.
        self._preparing, self._drawing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def close(self) -> None:
        self._batcher.close()
        for pool in (self._preparing, self._drawing):
            pool.shutdown(wait=False, cancel_futures=True)

    async def page(self) -> Response:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY})

    async def health(self) -> Response:
        session, alive = self._session, self._batcher.alive
        said = {
            "status": "ok" if alive else "stopped",
            "model": session.name,
            "plan": session.plan.digest,
            "injections": len(session.plan.injections),
            "device": str(session.model.device),
            "queue": self._batcher.waiting,
            "answering": self._batcher.answering,
            "max_tokens": self._limits.tokens,
            "max_images": self._limits.images,
        }
        return JSONResponse(said, 200 if alive else 503)

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._about()]})

    async def model(self, name: str) -> Response:
        if name != self._session.name:
            says = f"{name!r}: here is {self._session.name!r} alone."
            raise Refusal(404, says, field="model", code="model_not_found")
        return JSONResponse(self._about())

    async def completions(self, request: Request) -> Response:
        with _placed(self._batcher):
            body = await read_body(request, self._limits.body)
            loop = asyncio.get_running_loop()
            question, stream, usage = await loop.run_in_executor(self._preparing, self._question, body)
            del body
            listener = _Listener(loop)
            waiting = Waiting(question=question, hear=listener.hear, done=listener.hear)
            self._batcher.submit(waiting)
        completion = Completion(self._session.name, self._session.plan.digest)
        if stream:
            return _Stream(_events(listener, completion, usage), waiting)
        return await _whole(request, listener, completion, waiting)

    async def dealt(self, request: Request) -> Response:
        """Figures of one picture: which token of which tile enters before which layer; and the plan as text."""
        with _placed(self._batcher):
            body = await read_body(request, self._limits.body)
            return JSONResponse(await asyncio.get_running_loop().run_in_executor(self._drawing, self._figures, body))

    def _about(self) -> dict[str, Any]:
        return {"id": self._session.name, "object": "model", "created": self._since, "owned_by": "deepstack_pl"}

    def _question(self, body: bytes) -> tuple[Question, bool, bool]:
        """What is asked, whether as a stream, and whether with counts; of the pictures their views alone stay."""
        session = self._session
        positions = session.processor.max_length
        asked = read_request(
            read_json(body), model=session.name, limits=self._limits, positions=positions, root=self._root
        )
        try:
            question = session.question(
                asked.record(), max_tokens=asked.max_tokens, stop=asked.stop, settings=asked.settings
            )
        except ValueError as error:
            raise Refusal(400, str(error), field="messages") from error
        return question, asked.stream, asked.usage

    def _figures(self, body: bytes) -> dict[str, Any]:
        said = read_json(body)
        url = said.get("image") if isinstance(said, dict) and said.keys() == {"image"} else None
        if not isinstance(url, str):
            raise Refusal(400, "The body must be {'image': 'data:image/png;base64,...'}.", field="image")
        try:
            (picture,) = decoded([("image", bytes_of(url, "image", root=self._root, most=self._limits.body))])
        except ValueError as error:
            raise Refusal(400, str(error), field="image") from error
        processor, plan = self._session.processor, self._session.plan
        dealt = dealt_figure(picture, processor)
        return {
            "digest": plan.digest,
            "plan": plan.draw(),
            "plan_figure": _png(plan_figure(plan, processor.tokens_per_view)),
            "dealt_figure": None if dealt is None else _png(dealt),
        }


class _Listener:
    """Brings what the worker says into the server's loop: text, and at the end the answer or what went wrong."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._said = loop, asyncio.Queue[str | Answer | Exception]()

    def hear(self, said: str | Answer | Exception) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server stopped, and nobody listens
            self._loop.call_soon_threadsafe(self._said.put_nowait, said)

    async def next(self) -> str | Answer | Exception:
        return await self._said.get()

    async def answer(self) -> Answer:
        """Raises: Refusal: there is none."""
        while isinstance(said := await self.next(), str):
            pass
        return _answer(said)


class _Stream(StreamingResponse):
    """Server-sent events; a client that leaves stops the answer."""

    def __init__(self, events: AsyncIterator[str], waiting: Waiting) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._waiting = waiting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._waiting.give_up()


async def _events(listener: _Listener, completion: Completion, usage: bool) -> AsyncIterator[str]:
    yield _event(completion.chunk({"role": "assistant", "content": ""}))
    while isinstance(said := await listener.next(), str):
        yield _event(completion.chunk({"content": said}))
    try:
        answer = _answer(said)
    except Refusal as refusal:
        yield _event(refusal.body())
        return
    yield _event(completion.chunk({}, answer.finish))
    if usage:
        yield _event(completion.counts(answer))
    yield "data: [DONE]\n\n"


async def _whole(request: Request, listener: _Listener, completion: Completion, waiting: Waiting) -> Response:
    """The answer at its end, unless the client leaves before."""
    gone = asyncio.create_task(_left(request))
    answer = asyncio.create_task(listener.answer())
    try:
        await asyncio.wait({gone, answer}, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(completion.whole(answer.result())) if answer.done() else Response(status_code=_LEFT)
    finally:
        waiting.give_up()
        gone.cancel()
        answer.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _answer(said: Answer | Exception) -> Answer:
    if isinstance(said, Exception):
        _print(said)
        raise Refusal(500, f"The model failed: {type(said).__name__}. The server's terminal says more.") from said
    if said.finish == "cancelled":  # and not by its client, who no longer listens
        raise _stopping()
    return said


@contextmanager
def _placed(batcher: Batcher) -> Iterator[None]:
    """A place in the queue while a request is read."""
    try:
        with batcher.place():
            yield
    except Full as error:
        raise Refusal(503, "As many requests wait as --queue allows. Ask again in a moment.", code="full") from error


def _stopping() -> Refusal:
    return Refusal(503, "The server stops. Ask again when it is back.", code="stopping")


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _png(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal), "it is registered for those"
    return refused(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "it is registered for those"
    return refused(Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}."))


async def _failure(request: Request, error: Exception) -> Response:
    return refused(Refusal(500, f"The server failed: {type(error).__name__}. Its terminal says more."))


def _print(error: Exception) -> None:
    traceback.print_exception(error, file=sys.stderr)
