"""A socket, and the application behind it."""

import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from deepstack_pl.serving.api import make_app
from deepstack_pl.serving.config import Limits
from deepstack_pl.serving.session import Session


def serve(
    session: Session, limits: Limits, *, host: str, port: int, root: Path | None, ready: Callable[[str], None]
) -> None:
    """Answer until Ctrl-C; ``ready`` gets the address once it can be asked (``port`` 0 is any that is free).

    Raises:
        OSError: the port is taken, or the address is not this machine's.
    """
    config = uvicorn.Config(
        make_app(session, limits, host=host, root=root),
        log_level="warning",
        server_header=False,
        proxy_headers=False,  # headers say nothing of who asks
        ws="none",
        timeout_graceful_shutdown=3,
    )
    with _bound(host, port) as own:
        ready(f"http://{f'[{host}]' if ':' in host else host}:{own.getsockname()[1]}")
        uvicorn.Server(config).run(sockets=[own])


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)  # pyright: ignore[reportArgumentType]
    except (OSError, OverflowError) as error:
        raise OSError(f"--host {host} --port {port}: {error}. Name another port, or 0 for any that is free.") from error
