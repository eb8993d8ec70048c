"""What docs/serving.md tells people to type."""

import argparse
import json
import re
import shlex
import urllib.request
from pathlib import Path

import pytest
from served import a_session, picture, running

from deepstack_pl.cli import chat, serve
from deepstack_pl.serving.config import Limits

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
SHOWN = "http://127.0.0.1:8000"


def test_the_example_of_openais_client_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    picture().save(tmp_path / "page.png")
    monkeypatch.chdir(tmp_path)
    with running(a_session(), Limits(tokens=20)) as address:
        assert block.count(SHOWN) == 1
        exec(compile(block.replace(SHOWN, address), "docs/serving.md", "exec"), {})
    assert {"True", "False"} <= {line.split(" ")[0] for line in capsys.readouterr().out.splitlines()}


def test_the_examples_of_curl_are_answered() -> None:
    commands = re.findall(r"^    curl ((?:.*\\\n)*.*)$", PAGE, re.M)
    assert len(commands) == 2
    with running(a_session()) as address:
        for command in commands:
            url, *options = shlex.split(command.replace("\\\n", ""))
            given = dict(zip(options[::2], options[1::2], strict=True))
            body = given["-d"].replace("RUN", "tiny").encode() if "-d" in given else None
            headers = dict([given["-H"].split(": ")]) if "-H" in given else {}
            with urllib.request.urlopen(urllib.request.Request(url.replace(SHOWN, address), body, headers)) as reply:
                assert json.loads(reply.read())


def test_its_options_and_defaults_are_those_of_the_command() -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    rows = dict(re.findall(r"^\| `(--[\w-]+)` \|.*\| (\d+) \|$", PAGE, re.M))
    assert len(rows) == 5
    for name, default in rows.items():
        assert float(default) == parser.get_default(name[2:].replace("-", "_")), name
    known = set(parser.format_help().split()) | {"--no-sandbox"}
    chat.add_arguments(talk := argparse.ArgumentParser())
    known |= set(talk.format_help().split())
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", PAGE)) <= known
