"""A local HTTP server whose faults are chosen by the test."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """Serves ``files`` by path (without the leading slash); ``gets`` counts what was asked for.

    ``faults``: for a path, what happens to its next requests, one word each, the last one ever after: ok, missing
    (404), busy (503), forbidden (403), short (half of the body under its full length), wrong (a flipped byte), slow
    (a pause before the second half), closed (half of the body without its length), unsized (whole, but no length).
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.faults, self.pause = files, dict[str, list[str]](), 1.0
        self.gets: Counter[str] = Counter()
        self.url = ""


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[Server]:
    state, lock = Server(files), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

        def _answer(self, body: bool) -> None:
            path = self.path.lstrip("/").partition("?")[0]
            data = state.files.get(path)
            with lock:
                state.gets[path] += body
                left = state.faults.get(path, ["ok"])
                fault = left[0]
                if body and len(left) > 1:
                    left.pop(0)
            status = {"missing": 404, "busy": 503, "forbidden": 403}.get(fault, 200)
            if data is None or status != 200:
                self.send_error(404 if data is None else status)
                return
            half = len(data) // 2
            self.send_response(200)
            if fault != "unsized" and not (fault == "closed" and body):
                self.send_header("Content-Length", str(len(data)))
            else:
                self.close_connection = True
            self.end_headers()
            if not body:
                return
            if fault == "wrong":
                data = data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]
            self.wfile.write(data[:half])
            if fault in ("short", "closed"):
                self.close_connection = True
                return
            if fault == "slow":
                self.wfile.flush()
                time.sleep(state.pause)
            try:
                self.wfile.write(data[half:])
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client gave up on a slow server

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
