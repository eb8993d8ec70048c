"""The chat API, asked by OpenAI's own client, and what it refuses."""

import base64
import http.client
import json
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from fastapi.responses import JSONResponse
from served import a_session, asked, data_uri, picture, png, record, running

from deepstack_pl.batch import Record, Role, Turn
from deepstack_pl.serving import asked as requests
from deepstack_pl.serving.config import Limits, Settings
from deepstack_pl.serving.guard import Guard
from deepstack_pl.serving.replies import Refusal
from deepstack_pl.serving.session import Session
from deepstack_pl.stacking.config import ModelConfig

PAGE = data_uri(png(picture()))
LIMITS = Limits(body=200_000, images=2, tokens=24)


@pytest.fixture(scope="module")
def session() -> Session:
    return a_session()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    (folder / "root" / "deep").mkdir(parents=True)
    for file in ("root/page.png", "root/deep/a page.png", "outside.png"):
        (folder / file).write_bytes(png(picture()))
    (folder / "root" / "link.png").symlink_to(folder / "outside.png")
    (folder / "root" / "inner.png").symlink_to(folder / "root" / "page.png")
    (folder / "root" / "loop.png").symlink_to(folder / "root" / "loop.png")
    (folder / "root" / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(300_000))
    (folder / "root" / "half.png").write_bytes(png(picture()).ljust(120_000, b"\0"))
    (folder / "root" / "within").symlink_to(folder / "root" / "deep")
    return folder / "root"


@pytest.fixture(scope="module")
def server(session: Session, root: Path) -> Iterator[str]:
    with running(session, LIMITS, root) as address:
        yield address


@pytest.fixture
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def post(server: str, body: bytes, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, dict[str, Any]]:
    """Status and JSON of a request with just these headers besides the usual ones."""
    where = urlsplit(server)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=30)
    usual = {"Content-Type": "application/json", "Host": where.netloc}
    connection.request("POST", path, body, usual | {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    said = json.loads(answer.read())
    connection.close()
    return answer.status, said


def expected(session: Session, text: str, tokens: int = 24, **settings: Any) -> str:
    question = session.question(record(text, picture()), max_tokens=tokens, settings=Settings(**settings))
    return session.answer([question])[0].text


def test_openais_client_gets_the_models_answer_and_its_counts(client: openai.OpenAI, session: Session) -> None:
    done = client.chat.completions.create(**asked("Which colours?", PAGE, user="me", max_completion_tokens=9))
    assert done.choices[0].message.content == expected(session, "Which colours?", 9)
    assert done.choices[0].message.role == "assistant"
    assert done.system_fingerprint == session.plan.digest
    assert done.usage is not None
    prompt = session.processor.prompt(record("Which colours?", picture()))
    assert done.usage.prompt_tokens == len(prompt.input_ids)
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert done.choices[0].finish_reason == ("length" if done.usage.completion_tokens == 9 else "stop")


def test_a_stream_is_the_answer_piece_by_piece(client: openai.OpenAI, session: Session) -> None:
    stream = client.chat.completions.create(**asked("gold", PAGE, stream=True, stream_options={"include_usage": True}))
    chunks = list(stream)
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == expected(session, "gold")
    assert len([piece for piece in pieces if piece]) > 3
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] in (["stop"], ["length"])
    assert chunks[-1].usage is not None
    assert not chunks[-1].choices
    assert len({chunk.id for chunk in chunks}) == 1


def test_injections_are_left_out_for_one_request(client: openai.OpenAI, session: Session) -> None:
    texts = ["Which colours?", "gold", "red teal"]
    ask = client.chat.completions.create
    without = [ask(**asked(t, PAGE), extra_body={"injections": False}).choices[0].message.content for t in texts]
    assert without == [expected(session, text, injections=False) for text in texts]
    assert without != [ask(**asked(text, PAGE)).choices[0].message.content for text in texts]


def test_sampling_stop_strings_and_several_turns_reach_the_model(client: openai.OpenAI, session: Session) -> None:
    ask = client.chat.completions.create
    drawn = [ask(**asked("gold", PAGE, temperature=1, top_p=0.9, seed=7)).choices[0].message.content for _ in "ab"]
    assert drawn == [expected(session, "gold", temperature=1, top_p=0.9, seed=7)] * 2
    whole = expected(session, "gold")
    assert ask(**asked("gold", PAGE, stop=[whole[4:6], "%"])).choices[0].message.content == whole[:4].strip()
    body = asked("gold", PAGE)
    first = ask(**body).choices[0].message
    body["messages"] += [first, {"role": "user", "content": "Really?"}]
    assert ask(**body).usage.prompt_tokens > session.processor.prompt(record("gold", picture())).input_ids.numel()


def test_models_and_health_say_what_answers(client: openai.OpenAI, server: str, session: Session) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"] == [client.models.retrieve("tiny").id]
    with pytest.raises(openai.NotFoundError, match="here is 'tiny' alone"):
        client.models.retrieve("gpt-4")
    where = urlsplit(server)
    connection = http.client.HTTPConnection(where.netloc)
    connection.request("GET", "/health")
    said = json.loads(connection.getresponse().read())
    assert said | {"device": ""} == {
        "status": "ok",
        "model": "tiny",
        "plan": session.plan.digest,
        "injections": 4,
        "device": "",
        "queue": 0,
        "answering": 0,
        "max_tokens": 24,
        "max_images": 2,
    }


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"logprobs": True}, "logprobs=True: this server does not do that"),
        ({"n": 2}, "n=2: this server does not do that"),
        ({"n": True}, "n=True"),
        ({"tools": [{"type": "function"}]}, "tools="),
        ({"response_format": {"type": "json_object"}}, "response_format="),
        ({"presence_penalty": 0.5}, "presence_penalty=0.5"),
        ({"top_k": 5}, "'top_k': this server has no such field"),
        ({"injection": False}, "'injection': this server has no such field"),
        ({"injections": "no"}, "injections='no': must be true or false"),
        ({"temperature": "1"}, "temperature='1': must be a number"),
        ({"temperature": 3}, "temperature=3: must be 0"),
        ({"top_p": 0.5}, "top_p=0.5: without a temperature"),
        ({"max_tokens": 25}, "max_tokens=25: must be from 1 to 24, which --max-tokens allows"),
        ({"max_tokens": True}, "max_tokens=True: must be a whole number"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens says another number"),
        ({"stop": [""]}, "stop=.*: must be a text, or up to four"),
        ({"stream_options": {"include_usage": True}}, "it is for stream=true"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "hello"}, "messages='hello': must be a list"),
        ({"messages": [{"role": "system", "content": "Be brief."}]}, "templates have user and assistant alone"),
        (
            {"messages": [{"role": "user", "content": "a", "name": "Ann"}]},
            "messages.0., 'name': templates have no such",
        ),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages end with no question"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "must be {'type': 'text'"),
        (
            {"messages": [{"role": "user", "content": "What is <image>?"}]},
            "<image> is where a picture goes, and no word",
        ),
        ({"messages": [{"role": "user", "content": "red " * 4000}]}, "Questions are never cut"),
        ({"messages": asked("a", PAGE, PAGE, PAGE)["messages"]}, "3 pictures in one conversation"),
        ({"messages": asked("a")["messages"] * 257}, "257 messages, but the model's conversations have 256 positions"),
        ({"messages": asked("a" * 32_768)["messages"]}, "32,769 characters, and no more than 32,768 fit into the 256"),
        ({"stop": ["a" * 1_001]}, "a string of 1,001 characters is longer than 1,000"),
    ],
)
def test_what_would_change_the_answer_in_silence_is_refused_by_name(
    client: openai.OpenAI, changed: dict[str, Any], why: str
) -> None:
    body = asked("Which colours?") | changed
    with pytest.raises(openai.BadRequestError, match=why) as found:
        client.chat.completions.create(model="tiny", messages=[], extra_body=body)
    assert found.value.body["type"] == "invalid_request_error"


def test_what_asks_for_nothing_is_accepted(client: openai.OpenAI) -> None:
    neutral = {"n": 1, "logprobs": False, "tools": [], "presence_penalty": 0.0, "response_format": {"type": "text"}}
    client.chat.completions.create(
        **asked("gold", max_tokens=1, store=False, metadata={"a": "b"}, stop=None, **neutral)
    )


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="model='gpt-4': here is 'tiny' alone"):
        client.chat.completions.create(**asked("gold") | {"model": "gpt-4"})


def bomb(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes that says that it is this large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("urls", "why"),
    [
        (["http://127.0.0.1:9/page.png"], "this server never makes requests of its own"),
        (["HTTPS://example.com/page.png"], "this server never makes requests of its own"),
        (["page.png"], "this server never makes requests of its own"),
        (["data:image/png,nonsense"], "must begin as data:image/png;base64,"),
        (["data:text/html;base64,YQ=="], "must begin as data:image/png;base64,"),
        (["data:image/png;base64,*"], "is not base64"),
        ([f"data:image/png;{'a' * 100};base64,*"], r"the comma of 'data:image/png;a+\.\.\.' is not base64"),
        ([data_uri(b"<html>")], "a web page instead of a picture"),
        ([data_uri(png(picture())[:60])], "cut off or damaged"),
        ([data_uri(bomb(40_000, 40_000))], "an image of .* pixels; at most 64,000,000 are decoded"),
        ([data_uri(bomb(7_000, 7_000))] * 2, "2 pictures of 98,000,000 pixels together"),
        (["file:///etc/hostname"], "is not in the folder that --image-root names"),
        (["file://ROOT/../outside.png"], "is not in the folder"),
        (["file://ROOT/%2e%2e/outside.png"], "is not in the folder"),
        (["file://ROOT/link.png"], "is not in the folder"),
        (["file://ROOT/../nothing.png"], "is not in the folder"),
        (["file://elsewhere/ROOT/page.png"], "is not in the folder"),
        (["file://ROOT/page.png%00"], "is not in the folder"),
        (["file://ROOT/nothing.png"], "there is no such file"),
        (["file://ROOT"], "there is no such file"),
        (["file://ROOT/loop.png"], "is not in the folder|there is no such file"),
        (["file://ROOT/large.png"], "is larger than the 200,000 bytes"),
        (
            ["file://ROOT/half.png"] * 2,
            r"content.1.: .*half.png' is larger than the 80,000 bytes that --max-body-mb leaves",
        ),
        ([f"file://ROOT/within/{'a' * 300}.png"], r"'file:.*\.\.\.' cannot be read\."),
    ],
)
def test_pictures_that_are_no_pictures_or_not_to_be_read_are_refused(
    client: openai.OpenAI, root: Path, urls: list[str], why: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=why):
        client.chat.completions.create(**asked("gold", *(url.replace("ROOT", str(root)) for url in urls)))


def test_files_below_the_root_are_read_also_through_links_within_it(
    client: openai.OpenAI, root: Path, session: Session
) -> None:
    for file in ("page.png", "deep/a%20page.png", "inner.png"):
        done = client.chat.completions.create(**asked("gold", f"file://{root}/{file}"))
        assert done.choices[0].message.content == expected(session, "gold")


def test_a_file_that_cannot_be_read_does_not_say_where_links_lead(server: str, root: Path) -> None:
    """The system's own sentence has the path behind them."""
    body = json.dumps(asked("gold", f"file://{root}/within/{'a' * 300}.png")).encode()
    status, said = post(server, body)
    assert (status, "deep" in said["error"]["message"]) == (400, False)


def test_pictures_are_counted_before_any_is_read(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.setattr(requests, "bytes_of", lambda *args, **how: pytest.fail("a picture was read"))
    many = asked("gold", *[f"file://{root}/page.png"] * 50)
    many["messages"] = [*many["messages"], {"role": "assistant", "content": "red"}, *many["messages"]]
    with pytest.raises(Refusal, match="100 pictures in one conversation; --max-images allows 2"):
        requests.read_request(many, model="tiny", limits=LIMITS, positions=256, root=root)


def test_others_are_served_while_a_request_is_read(
    monkeypatch: pytest.MonkeyPatch, client: openai.OpenAI, session: Session
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    right = requests.bytes_of

    def slowly(*args: Any, **how: Any) -> bytes:
        begun.set()
        assert go_on.wait(20)
        return right(*args, **how)

    monkeypatch.setattr(requests, "bytes_of", slowly)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.chat.completions.create, **asked("gold", PAGE))
        assert begun.wait(20)
        try:
            assert client.with_options(timeout=5).models.retrieve("tiny").id == "tiny"
        finally:
            go_on.set()
        assert waiting.result().choices[0].message.content == expected(session, "gold")


def test_an_answer_that_spells_a_placeholder_does_not_break_the_next_turn(
    client: openai.OpenAI, session: Session
) -> None:
    body = asked("gold", PAGE)
    body["messages"] += [{"role": "assistant", "content": "an <image>."}, {"role": "user", "content": "Really?"}]
    done = client.chat.completions.create(**body)
    first = record("gold", picture())
    turns = (*first.turns, Turn(Role.assistant, "an <image>.", plain=True), Turn(Role.user, "Really?"))
    question = session.question(Record(key="again", turns=turns, images=first.images), max_tokens=24)
    assert done.usage is not None
    assert done.usage.prompt_tokens == len(question.sample.input_ids)
    assert done.choices[0].message.content == session.answer([question])[0].text


def test_no_file_is_read_without_a_root(session: Session, root: Path) -> None:
    with running(session) as address:
        status, said = post(address, json.dumps(asked("gold", f"file://{root}/page.png")).encode())
    assert (status, "none may be read" in said["error"]["message"]) == (400, True)


@pytest.mark.parametrize(
    ("body", "headers", "status", "why"),
    [
        (b"{", {}, 400, "no JSON"),
        (b"[" * 100_000, {}, 400, "no JSON"),
        (b"[]", {}, 400, "no JSON object"),
        (json.dumps(asked("\ud800")).encode(), {}, 400, "half a character"),
        (json.dumps(asked("a", **{"\ud800": 1})).encode(), {}, 400, "'\\ud800': this server has no such field"),
        (json.dumps(asked("a", **{"b" * 999: 1})).encode(), {}, 400, f"'{'b' * 76}...: this server has no such field"),
        (json.dumps(asked("a") | {"messages": [{"\ud800": 1}]}).encode(), {}, 400, "'\\ud800': templates have no such"),
        (json.dumps(asked("a", "data:image/\ud800;base64,*")).encode(), {}, 400, "is not base64"),
        (json.dumps({"\ud800": 1, "image": 1}).encode(), {}, 400, "\\ud800"),
        (b" " * 200_001, {}, 413, "larger than the 200,000 bytes that --max-body-mb allows"),
        (b" " * 2_000_000, {}, 413, "larger than the 200,000 bytes"),
        (b"{}", {"Content_Type": "text/plain"}, 415, "Content-Type must be application/json"),
        (b"{}", {"Host": "evil.example"}, 403, "Host: 'evil.example' is not this server"),
        (b"{}", {"Host": "10.0.0.1"}, 403, "Host: '10.0.0.1'"),
        (b"{}", {"Host": "127.0.0.1.evil.example:80"}, 403, "is not this server"),
        (b"{}", {"Host": "localhost@evil.example"}, 403, "is not this server"),
        (b"{}", {"Origin": "http://evil.example"}, 403, "pages of other sites"),
        (b"{}", {"Origin": "null"}, 403, "pages of other sites"),
        (b"{}", {"Host": "localhost"}, 400, "model is missing"),
        (b"{}", {"Host": "[::1]:80", "Origin": "http://[::1]:80"}, 400, "model is missing"),
    ],
)
def test_requests_are_refused_in_openais_words_before_they_are_read(
    server: str, body: bytes, headers: dict[str, str], status: int, why: str
) -> None:
    found, said = post(server, body, **headers)
    assert (found, why in said["error"]["message"]) == (status, True), said
    assert said["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("listens", "host", "passes"),
    [
        ("192.168.1.5", "192.168.1.5:8000", True),
        ("192.168.1.5", "192.168.1.6:8000", False),
        ("lab.example", "LAB.example", True),
        ("0.0.0.0", "192.168.1.5:8000", True),
        ("::", "[fe80::1]:8000", True),
        ("0.0.0.0", "evil.example", False),
        ("0.0.0.0", "", False),
        ("127.0.0.1", "[oops", False),
    ],
)
def test_a_host_is_one_that_no_other_site_can_be_made_to_say(listens: str, host: str, passes: bool) -> None:
    guard = Guard(JSONResponse(None), listens)
    assert (guard._refusal({"host": host}, "GET") is None) is passes


def test_a_body_without_a_length_is_counted_while_it_comes(server: str) -> None:
    where = urlsplit(server)
    connection = http.client.HTTPConnection(where.netloc, timeout=30)
    parts = (b" " * 50_000 for _ in range(8))
    connection.request("POST", "/v1/chat/completions", parts, {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_the_page_may_run_nothing_but_itself_and_other_paths_are_not_there(server: str) -> None:
    where = urlsplit(server)
    connection = http.client.HTTPConnection(where.netloc)
    connection.request("GET", "/")
    answer = connection.getresponse()
    page, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    assert "default-src 'none'; script-src 'sha256-" in policy
    assert "unsafe" not in policy
    assert not any(word in page for word in ("innerHTML", "http://", "https://", "style=", " onclick"))
    for path in ("/docs", "/openapi.json", "/../pyproject.toml"):
        connection.request("GET", path)
        answer = connection.getresponse()
        assert (answer.status, "error" in json.loads(answer.read())) == (404, True)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "Access-Control-Allow-Origin" not in answer.headers


def test_the_dealt_picture_is_drawn(server: str, session: Session) -> None:
    status, said = post(server, json.dumps({"image": PAGE}).encode(), "/v1/deepstack/dealt")
    assert (status, said["digest"], said["plan"]) == (200, session.plan.digest, session.plan.draw())
    for name in ("plan_figure", "dealt_figure"):
        assert base64.b64decode(said[name].removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    for wrong in ({"image": data_uri(b"nonsense")}, {"image": 3}, {"picture": PAGE}, []):
        assert post(server, json.dumps(wrong).encode(), "/v1/deepstack/dealt")[0] == 400


def test_a_plan_without_tiles_has_no_dealt_picture() -> None:
    with running(a_session(ModelConfig(name="baseline", tiles=0, groups=0))) as address:
        status, said = post(address, json.dumps({"image": PAGE}).encode(), "/v1/deepstack/dealt")
    assert (status, said["dealt_figure"]) == (200, None)
