"""What stands before every request: whose it is, and how much of it is read."""

import asyncio
import json
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepstack_pl.serving.replies import Refusal

LOCAL = ("localhost", "127.0.0.1", "::1")
_SECONDS = 60  # for a body to arrive: a client that sends none would hold its place in the queue
_DRAIN = 5  # seconds in which the rest of a body that is too large is thrown away: else its sender sees a broken pipe
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Only requests that name this machine get through: a page of another site whose name was made to point here (DNS
    rebinding) says its own name. And only this server's own pages may send any.

    There is no header that would let other sites read answers (CORS).
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app, self._host = app, host.lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(Headers(scope=scope), scope["method"])
        app = self._app if refusal is None else refused(refusal)
        await app(scope, receive, sending)

    def _refusal(self, headers: Mapping[str, str], method: str) -> Refusal | None:
        host = headers.get("host", "")
        if not self._ours(_hostname(host)):
            return Refusal(403, f"Host: {host!r} is not this server. Ask for localhost, or for the address of --host.")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return Refusal(403, f"Origin: {origin!r}: pages of other sites may not ask this server.")
        if method == "POST" and headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return Refusal(415, "Content-Type must be application/json.")
        return None

    def _ours(self, name: str) -> bool:
        if name in LOCAL or name == self._host:
            return True
        try:  # who listens everywhere has many addresses; no name can be made to be a number
            return ip_address(self._host).is_unspecified and bool(ip_address(name))
        except ValueError:
            return False


def refused(refusal: Refusal) -> JSONResponse:
    """The refusal in OpenAI's words."""
    return JSONResponse(refusal.body(), refusal.status, headers=refusal.headers())


async def read_body(request: Request, most: int) -> bytes:
    """A body of at most ``most`` bytes.

    Raises:
        Refusal: it is larger, or does not come.
    """
    try:
        async with asyncio.timeout(_SECONDS):
            return await _body(request, most)
    except TimeoutError as error:
        raise Refusal(408, f"The body did not come within {_SECONDS} seconds. Send it again.") from error


def read_json(body: bytes) -> Any:
    """Its JSON; of a large one it takes a while.

    Raises:
        Refusal: it is none.
    """
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"The body is no JSON that can be read: {error}.") from error


async def _body(request: Request, most: int) -> bytes:
    said = request.headers.get("content-length", "0")
    body = bytearray()
    if said.isascii() and said.isdigit() and int(said) <= most:
        async for part in request.stream():
            body += part
            if len(body) > most:
                break
        else:
            return bytes(body)
    del body
    try:
        async with asyncio.timeout(_DRAIN):
            dropped = 0
            async for part in request.stream():
                dropped += len(part)
                if dropped > 4 * most:
                    break
    except TimeoutError:
        dropped = most  # it goes on for longer than anybody waits; the connection is closed on it
    raise Refusal(
        413,
        f"The body is larger than the {most:,} bytes that --max-body-mb allows. Send smaller pictures, or fewer.",
        code="request_too_large",
    )


def _hostname(host: str) -> str:
    """The name in a Host header, without a port; empty where it has none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
