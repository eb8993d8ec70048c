"""Many clients at once: every answer is the one its question gets alone, and who leaves or comes too late is told."""

import http.client
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from served import Slow, a_session, asked, data_uri, picture, png, record, running, until

from deepstack_pl.serving.batcher import Batcher, Full, Waiting
from deepstack_pl.serving.config import Limits, Settings
from deepstack_pl.serving.session import Answer, Question, Session

TEXTS = ("red teal", "Which colours?", "gold", "Name the weaves.")
CASES = [
    (text, number, tokens, injections)
    for text in TEXTS
    for number in (0, 1)
    for tokens, injections in ((6, True), (12, True), (12, False))
]


def alone(session: Session) -> dict[Any, str]:
    """What each case is answered by itself."""
    return {
        case: session.answer(
            [
                session.question(
                    record(case[0], picture(case[1])), max_tokens=case[2], settings=Settings(injections=case[3])
                )
            ]
        )[0].text
        for case in CASES
    }


def ask(client: openai.OpenAI, case: Any, stream: bool) -> str:
    text, number, tokens, injections = case
    body = asked(text, data_uri(png(picture(number))), max_tokens=tokens, extra_body={"injections": injections})
    if not stream:
        return client.chat.completions.create(**body).choices[0].message.content or ""
    return "".join(c.choices[0].delta.content or "" for c in client.chat.completions.create(**body, stream=True))


def a_client(address: str, **more: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", **{"max_retries": 0, **more})


def health(address: str) -> dict[str, Any]:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)
    connection.request("GET", "/health")
    said = json.loads(connection.getresponse().read())
    connection.close()
    return said


def test_eight_clients_get_what_each_question_gets_alone() -> None:
    session = a_session()
    right, slow = alone(session), Slow(session)
    slow.pause = 0.001
    with running(slow) as address:

        def several(number: int) -> list[tuple[Any, str]]:
            client, order = a_client(address), random.Random(number).sample(CASES, 4)
            return [(case, ask(client, case, stream=place % 2 == 0)) for place, case in enumerate(order)]

        with ThreadPoolExecutor(8) as pool:
            found = [pair for pairs in pool.map(several, range(8)) for pair in pairs]
    assert len(found) == 32
    assert all(right[case] == answer for case, answer in found)
    assert 1 < max(slow.batches) <= 8
    assert sum(slow.batches) == 32


@pytest.mark.slow
def test_a_minute_of_clients_that_ask_sample_and_leave() -> None:
    session = a_session()
    right, slow = alone(session), Slow(session)
    slow.pause = 0.002
    end = time.monotonic() + 60
    drawn = session.answer(
        [session.question(record("gold"), max_tokens=8, settings=Settings(temperature=1.0, seed=5))]
    )[0].text
    with running(slow, Limits(queue=64)) as address:

        def client(number: int) -> int:
            chance, own, count = random.Random(number), a_client(address), 0
            while time.monotonic() < end:
                count += 1
                case = chance.choice(CASES)
                what = chance.random()
                if what < 0.1:
                    said = own.chat.completions.create(**asked("gold", max_tokens=8, temperature=1.0, seed=5))
                    assert said.choices[0].message.content == drawn
                elif what < 0.2:
                    with own.chat.completions.create(**asked("gold", stream=True)) as stream:
                        next(iter(stream))
                else:
                    assert ask(own, case, stream=what < 0.6) == right[case]
            return count

        with ThreadPoolExecutor(8) as pool:
            counts = list(pool.map(client, range(8)))
        until(lambda: (health(address)["queue"], health(address)["answering"]) == (0, 0))
        assert min(counts) > 10


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_worker(stream: bool) -> None:
    with running(Slow(a_session(endless=True))) as address:  # 400 tokens would take 8 seconds
        where = urlsplit(address)
        connection = http.client.HTTPConnection(where.netloc, timeout=30)
        body = json.dumps(asked("gold", max_tokens=400, stream=stream))
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        until(lambda: health(address)["answering"] == 1)
        if stream:
            connection.getresponse().read(100)
        connection.close()
        until(lambda: health(address)["answering"] == 0, seconds=3)
        assert a_client(address).chat.completions.create(**asked("gold", max_tokens=2)).choices[0].message.content


def test_who_comes_when_the_queue_is_full_is_told_to_come_again() -> None:
    with running(Slow(a_session(endless=True)), Limits(queue=2, batch=1)) as address:
        with ThreadPoolExecutor(3) as pool:
            client = a_client(address)
            body = asked("gold", max_tokens=60)
            begun = [pool.submit(client.chat.completions.create, **body)]
            until(lambda: health(address)["answering"] == 1)
            begun += [pool.submit(client.chat.completions.create, **body) for _ in "ab"]
            until(lambda: health(address)["queue"] == 2)
            with pytest.raises(openai.InternalServerError, match="As many requests wait as --queue allows") as found:
                client.chat.completions.create(**body)
            assert (found.value.status_code, found.value.response.headers["Retry-After"]) == (503, "1")
            assert len({each.result().choices[0].message.content for each in begun}) == 1
        patient = a_client(address, max_retries=2)
        assert patient.chat.completions.create(**body).choices[0].finish_reason == "length"


def test_a_model_that_fails_is_an_error_of_its_batch_and_the_next_is_answered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = a_session()
    right = session.model.generate

    def fails(**inputs: Any) -> Any:
        raise RuntimeError("out of memory")

    with running(session) as address:
        monkeypatch.setattr(session.model, "generate", fails)
        with pytest.raises(openai.InternalServerError, match="The model failed: RuntimeError"):
            a_client(address).chat.completions.create(**asked("gold"))
        with pytest.raises(openai.APIError, match="The model failed: RuntimeError"):
            list(a_client(address).chat.completions.create(**asked("gold", stream=True)))
        monkeypatch.setattr(session.model, "generate", right)
        assert a_client(address).chat.completions.create(**asked("gold")).choices
    assert "out of memory" in capsys.readouterr().err


def test_a_server_that_stops_gives_up_what_it_answers() -> None:
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        with running(Slow(a_session(endless=True)), Limits()) as address:
            begun = pool.submit(a_client(address).chat.completions.create, **asked("gold", max_tokens=500))
            until(lambda: health(address)["answering"] == 1)
        with pytest.raises(openai.APIError):
            begun.result()
    assert time.monotonic() - began < 8, "500 tokens would take 10 seconds"


class Small(Session):
    """Fails with more than ``room`` questions at once, after ``said`` of them were heard; and with "bad" always."""

    def __init__(self, session: Session, room: int, said: int = 0) -> None:
        super().__init__(session.model, session.processor, session.name)
        self.room, self.said, self.open, self.batches = room, said, threading.Event(), list[int]()
        self.bad = self.question(record("bad"), max_tokens=4).sample.input_ids.tolist()

    def answer(self, questions: Any, hear: Any = None, cancelled: Any = None) -> list[Answer]:
        assert self.open.wait(20)
        self.batches.append(len(questions))
        for own in hear[: self.said if len(questions) > self.room else 0]:
            own("begun")
        if len(questions) > self.room or any(each.sample.input_ids.tolist() == self.bad for each in questions):
            raise RuntimeError("out of memory")
        return super().answer(questions, hear, cancelled)


@pytest.mark.parametrize("said", [0, 1])
def test_of_a_batch_that_fails_only_those_fail_that_fail_alone_or_were_heard(
    said: int, capsys: pytest.CaptureFixture[str]
) -> None:
    session = Small(a_session(), room=2, said=said)
    batcher = Batcher(session, batch=4, queue=9)
    texts = ("first", "gold", "red teal", "bad", "Which colours?")
    done: dict[str, Any] = {}
    heard: dict[str, list[str]] = {text: [] for text in texts}
    for text in texts:
        question = session.question(record(text), max_tokens=4)
        with batcher.place():
            batcher.submit(
                Waiting(
                    question=question, hear=heard[text].append, done=lambda said, text=text: done.update({text: said})
                )
            )
        if text == "first":
            until(lambda: batcher.answering == 1)
    session.open.set()
    until(lambda: len(done) == len(texts))
    until(lambda: batcher.answering == 0)
    batcher.close()
    assert session.batches == [1, 4, *[1] * (4 - said)]
    fails = {"bad", *texts[1 : 1 + said]}
    assert {text for text, outcome in done.items() if isinstance(outcome, RuntimeError)} == fails
    for text in set(texts) - fails:
        (alone,) = Session.answer(session, [session.question(record(text), max_tokens=4)])
        assert done[text] == alone
        assert "".join(heard[text]) == alone.text
    assert f"4 questions failed together (RuntimeError): the {4 - said} of which" in capsys.readouterr().err


class Gate(Session):
    """Answers once it is open, and remembers its batches."""

    def __init__(self, session: Session) -> None:
        super().__init__(session.model, session.processor, session.name)
        self.open, self.batches = threading.Event(), list[list[Question]]()

    def answer(self, questions: Any, hear: Any = None, cancelled: Any = None) -> list[Answer]:
        self.batches.append(list(questions))
        assert self.open.wait(20)
        return super().answer(questions, hear, cancelled)


def test_a_batch_holds_what_waits_longest_and_all_that_is_asked_as_that_is() -> None:
    session = Gate(a_session())
    batcher = Batcher(session, batch=3, queue=20)
    done: list[Any] = []

    def submit(text: str, **settings: Any) -> Waiting:
        question = session.question(record(text), max_tokens=2, settings=Settings(**settings))
        waiting = Waiting(question=question, hear=lambda text: None, done=done.append)
        with batcher.place():
            batcher.submit(waiting)
        return waiting

    sampled = {"temperature": 1.0, "seed": 1}
    first = submit("first")
    until(lambda: batcher.answering == 1)
    off = [submit("off", injections=False)]
    on = [submit(text) for text in ("a", "b", "c", "d")]
    drawn = [submit("drawn", **sampled) for _ in "ab"]
    off.append(submit("off too", injections=False))
    left = submit("left")
    left.give_up()
    session.open.set()
    until(lambda: len(done) == 10)
    batches = [[first], off, on[:3], [on[3]], [drawn[0]], [drawn[1]]]
    assert session.batches == [[each.question for each in batch] for batch in batches]
    assert done[1].finish == "cancelled"
    batcher.close()
    assert not batcher.alive
    with pytest.raises(Full), batcher.place():
        pass


def test_who_left_takes_no_place_in_the_queue() -> None:
    session = Gate(a_session())
    batcher = Batcher(session, batch=1, queue=2)
    question = session.question(record("gold"), max_tokens=2)
    done: list[Answer | Exception] = []

    def submit() -> Waiting:
        with batcher.place():
            waiting = Waiting(question=question, hear=lambda text: None, done=done.append)
            batcher.submit(waiting)
        return waiting

    submit()
    until(lambda: batcher.answering == 1)
    waiting = [submit(), submit()]
    with pytest.raises(Full), batcher.place():
        pass
    waiting[0].give_up()
    assert batcher.waiting == 1
    submit()
    session.open.set()
    until(lambda: len(done) == 4)
    assert [each.finish == "cancelled" for each in done if isinstance(each, Answer)] == [True, False, False, False]
    batcher.close()
