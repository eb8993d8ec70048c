"""A loaded model that answers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from served import a_run, a_session, picture, record, records
from small_run import STACKED, TALKATIVE, small_model, small_processor

from deepstack_pl.evaluation.runner import generate
from deepstack_pl.serving.config import Limits, Settings
from deepstack_pl.serving.session import Session
from deepstack_pl.stacking.config import Host, InjectionConfig, ModelConfig

OFF = Settings(injections=False)


@pytest.fixture(scope="module")
def session() -> Session:
    return a_session()


def one(session: Session, settings: Settings, tokens: int = 24, text: str = "Which colours?") -> str:
    question = session.question(record(text, picture()), max_tokens=tokens, settings=settings)
    return session.answer([question])[0].text


def test_answers_of_a_batch_are_those_of_each_question_alone_and_of_evaluation(session: Session) -> None:
    lengths = [5 + place for place in range(len(records()))]
    questions = [session.question(each, max_tokens=n) for each, n in zip(records(), lengths, strict=True)]
    together = session.answer(questions)
    assert together == [session.answer([question])[0] for question in questions]
    evaluated = [
        generate(session.model, session.processor, [each], n)[0] for each, n in zip(records(), lengths, strict=True)
    ]
    assert [answer.text for answer in together] == evaluated
    assert len({answer.text for answer in together}) > 6
    assert all(answer.tokens <= n for answer, n in zip(together, lengths, strict=True))
    assert together[5].prompt_tokens == len(session.processor.prompt(records()[5]).input_ids)


def test_what_is_heard_while_it_is_written_is_the_answer(session: Session) -> None:
    questions = [session.question(each, max_tokens=20) for each in records()]
    pieces: list[list[str]] = [[] for _ in questions]
    answers = session.answer(questions, [own.append for own in pieces])
    assert ["".join(own) for own in pieces] == [answer.text for answer in answers]
    assert max(len(own) for own in pieces) > 5


def test_a_stop_string_ends_its_own_row_alone_and_is_left_out(session: Session) -> None:
    plain = [session.question(each, max_tokens=20) for each in records()]
    whole = [answer.text for answer in session.answer(plain)]
    stop = whole[5][6:9]
    stopped = session.answer([*plain[:5], replace(plain[5], stop=("never said", stop)), *plain[6:]])
    assert stopped[5].text == whole[5][: whole[5].find(stop)].strip()
    assert (stopped[5].finish, stopped[5].tokens < 20) == ("stop", True)
    assert [answer.text for answer in [*stopped[:5], *stopped[6:]]] == [*whole[:5], *whole[6:]]


@pytest.mark.parametrize(
    "plan",
    [
        STACKED,
        ModelConfig(
            name="deepstack_lv",
            start_layer=0,
            injections=[InjectionConfig(host=Host.vit, group=k, layer=k) for k in range(4)],
        ),
    ],
    ids=["llm", "tower"],
)
def test_without_injections_it_answers_as_the_plan_without_them_and_is_left_as_it_was(plan: ModelConfig) -> None:
    stacked = a_session(plan)
    bare_plan = ModelConfig(name="baseline", tiles=0, groups=0)
    bare_model = small_model(bare_plan, TALKATIVE)
    bare_model.load_state_dict(stacked.model.state_dict())
    bare = Session(bare_model, small_processor(bare_plan), "bare")
    before = {name: tensor.clone() for name, tensor in stacked.model.state_dict().items()}

    def answers(session: Session, settings: Settings) -> list[str]:
        questions = [session.question(each, max_tokens=16, settings=settings) for each in records()]
        return [answer.text for answer in session.answer(questions)]

    with_all, without = answers(stacked, Settings()), answers(stacked, OFF)
    assert without == answers(bare, Settings())
    assert without[:5] == with_all[:5], "no picture, nothing to inject"
    assert sum(one != other for one, other in zip(without[5:], with_all[5:], strict=True)) > 3
    assert answers(stacked, Settings()) == with_all
    assert all(torch.equal(tensor, before[name]) for name, tensor in stacked.model.state_dict().items())


def test_a_seed_gives_its_answer_again_and_takes_no_random_number_of_others(session: Session) -> None:
    state = torch.get_rng_state()
    drawn = [one(session, Settings(temperature=1.0, seed=seed)) for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    assert one(session, Settings(temperature=1.0)) != one(session, Settings(temperature=1.0))
    assert torch.equal(torch.get_rng_state(), state)
    assert one(session, Settings(temperature=1.0, top_p=1e-6, seed=4)) == one(session, Settings())


def test_sampled_and_different_questions_share_no_batch(session: Session) -> None:
    def question(settings: Settings):
        return session.question(record("gold"), max_tokens=4, settings=settings)

    with pytest.raises(ValueError, match="the same settings, greedy ones"):
        session.answer([question(Settings(temperature=1.0, seed=1))] * 2)
    with pytest.raises(ValueError, match="the same settings"):
        session.answer([question(OFF), question(Settings())])


def test_an_answer_that_nobody_waits_for_ends_at_its_next_token() -> None:
    session = a_session(endless=True)
    questions = [session.question(each, max_tokens=100) for each in records()[:2]]
    pieces: list[str] = []
    answers = session.answer(questions, [pieces.append, lambda text: None], [lambda: len(pieces) > 2, lambda: False])
    assert (answers[0].finish, answers[0].text) == ("cancelled", "".join(pieces))
    assert answers[0].tokens < answers[1].tokens == 100
    assert answers[1].text == session.answer(questions[1:])[0].text


def test_an_answer_ends_where_the_llm_has_no_more_positions(session: Session) -> None:
    long = session.question(record("red " * 40), max_tokens=10_000)
    assert long.max_tokens == 512 - len(long.sample.input_ids)
    with pytest.raises(ValueError, match=r"its question takes .* Questions are never cut"):
        session.question(record("red " * 4000), max_tokens=1)
    roomy = small_processor()
    roomy.max_length = 10_000
    with pytest.raises(ValueError, match="the LLM has 512: there is no room for an answer"):
        Session(session.model, roomy, "roomy").question(record("red teal gold " * 400), max_tokens=1)


def test_a_folder_is_loaded_onto_a_device_that_is_there(tmp_path: Path) -> None:
    loaded = Session.load(a_run(tmp_path / "run"), "cpu")
    assert (loaded.name, one(loaded, Settings())) == ("run", one(a_session(), Settings()))
    with pytest.raises(ValueError, match=r"--device toaster: .* Leave it out"):
        Session.load(tmp_path / "run", "toaster")


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"temperature": -1}, "temperature=-1: must be 0 .greedy., or from 0.01 to 2"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 1e-9}, "temperature=1e-09"),
        ({"temperature": 1, "top_p": 0}, "top_p=0: must be above 0"),
        ({"top_p": 0.5}, "top_p=0.5: without a temperature answers are greedy"),
        ({"temperature": 1, "seed": -1}, "seed=-1: must be a whole number"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Settings(**wrong)
    with pytest.raises(ValueError, match="queue=0: a limit must be at least 1"):
        Limits(queue=0)
