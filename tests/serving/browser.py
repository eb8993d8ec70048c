"""A headless Chromium, spoken to over two pipes in the words of its DevTools: nothing needs to be installed for it."""

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")
# It reads descriptor 3 and writes 4; in this process those are somebody else's.
_LAUNCH = """
import fcntl, os, sys
reads, writes = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(reads, 3)
os.dup2(writes, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """One tab. ``errors`` are what its console would show in red, whatever raised it: scripts, requests, the policy."""

    def __init__(self, reads: int, writes: int) -> None:
        self._reads, self._writes = reads, writes
        self._rest, self._count, self._tab = b"", 0, ""
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._tab = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **given: Any) -> dict[str, Any]:
        """What the browser answers to one command."""
        self._count += 1
        said = {"id": self._count, "method": method, "params": given} | ({"sessionId": self._tab} if self._tab else {})
        os.write(self._writes, json.dumps(said).encode() + b"\0")
        while (heard := self._hear()).get("id") != self._count:
            self._note(heard)
        assert "error" not in heard, (method, heard)
        return heard["result"]

    def run(self, script: str) -> Any:
        """The value of an expression of the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, (script, found)
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 30) -> None:
        """Wait until the expression is true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, (script, self.errors, self.run("document.body.innerText"))
            time.sleep(0.02)

    def choose(self, selector: str, *files: Path) -> None:
        """Choose files as a person does in the dialogue."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def type_and_enter(self, text: str) -> None:
        """Keys for what has the focus."""
        self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
            )

    def _hear(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._reads], [], [], 60)[0], "the browser says nothing"
            part = os.read(self._reads, 1 << 16)
            assert part, "the browser ended"
            self._rest += part
        one, _, self._rest = self._rest.partition(b"\0")
        return json.loads(one)

    def _note(self, heard: dict[str, Any]) -> None:
        said = heard.get("params", {})
        match heard.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(json.dumps(said["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if said["type"] in ("error", "warning", "assert"):
                self.errors.append(json.dumps(said["args"]))
            case "Log.entryAdded" if said["entry"]["level"] in ("error", "warning"):
                self.errors.append(json.dumps(said["entry"]))


@contextmanager
def opened(folder: Path) -> Iterator[Page]:
    """A browser with its profile in ``folder``."""
    assert CHROMIUM is not None
    (reads, its_end), (its_start, writes) = os.pipe(), os.pipe()
    words = [sys.executable, "-c", _LAUNCH, str(its_start), str(its_end), CHROMIUM]
    with (folder / "browser.log").open("wb") as log:
        process = subprocess.Popen(
            [*words, *_FLAGS, f"--user-data-dir={folder / 'profile'}"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(its_start, its_end),
        )  # fmt: skip
    os.close(its_start)
    os.close(its_end)
    try:
        yield Page(reads, writes)
    finally:
        os.close(writes)  # at which it ends
        os.close(reads)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
