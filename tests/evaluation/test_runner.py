"""Evaluation by generation: what is asked, what is scored, and what it leaves untouched."""

from dataclasses import replace

import pytest
import torch
from rich.progress import Progress
from small_run import TOKENIZER, Pages, small_model, small_processor
from torch import distributed

from deepstack_pl.batch import Role, Turn
from deepstack_pl.evaluation.config import EvaluationConfig
from deepstack_pl.evaluation.runner import evaluate, generate, stop_ids
from deepstack_pl.language.template import TEMPLATES

CONFIG = EvaluationConfig(name="small", samples=8, batch_size=4, max_new_tokens=9)


@pytest.fixture(scope="module")
def taught():
    """A model that has learned some of the pages: untrained ones answer all alike."""
    torch.manual_seed(0)
    model, processor, pages = small_model().train(), small_processor(), Pages()
    batch = processor.collate([processor.prepare(pages[i]) for i in range(12)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        model(**batch.model_inputs()).loss.backward()
        optimizer.step()
    return model.eval()


class Blank(Pages):
    """Pages whose answers are not to be seen."""

    def __getitem__(self, index):
        record = super().__getitem__(index)
        return replace(record, turns=(*record.turns[:-1], Turn(Role.assistant, "navy navy")))


def test_predictions_do_not_depend_on_the_batch(taught):
    one, three, all_at_once = (
        evaluate(taught, small_processor(), Pages(), replace(CONFIG, batch_size=size), 12).records
        for size in (1, 5, 12)
    )
    assert [r.prediction for r in one] == [r.prediction for r in three] == [r.prediction for r in all_at_once]
    assert len({r.prediction for r in one}) > 3


def _one_of_two(rank: int, folder: str, model) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = [evaluate(model, small_processor(), Pages(), CONFIG, count) for count in (1, 3, 12)]
    torch.save([(each.metrics, [r.prediction for r in each.records]) for each in found], f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_find_what_one_finds_of_fewer_samples_than_give_each_a_batch(taught, tmp_path):
    torch.multiprocessing.start_processes(_one_of_two, args=(str(tmp_path), taught), nprocs=2, start_method="fork")
    alone = [evaluate(taught, small_processor(), Pages(), CONFIG, count) for count in (1, 3, 12)]
    expected = [(each.metrics, [r.prediction for r in each.records]) for each in alone]
    assert torch.load(tmp_path / "0.pt", weights_only=False) == expected
    assert torch.load(tmp_path / "1.pt", weights_only=False) == expected


def test_a_taught_model_scores_and_records_agree_with_metrics(taught):
    results = evaluate(taught, small_processor(), Pages(), CONFIG, 12)
    assert [r.index for r in results.records] == list(range(12))
    for kind, found in results.metrics.items():
        records = [r for r in results.records if r.kind == kind]
        assert found["samples"] == len(records)
        assert found["accuracy"] == sum(sum(r.correct) for r in records) / sum(len(r.correct) for r in records)
        assert found["exact_match"] == sum(r.prediction == r.answer for r in records) / len(records)
    assert results.metrics["long"]["accuracy"] > 0.5


def test_the_answer_is_not_shown_to_the_model(taught):
    shown, hidden = (evaluate(taught, small_processor(), source, CONFIG, 4) for source in (Pages(), Blank()))
    assert [r.prediction for r in shown.records] == [r.prediction for r in hidden.records]


def test_predictions_hold_new_text_alone_and_end_with_the_answer(taught):
    for record in evaluate(taught, small_processor(), Pages(), CONFIG, 12).records:
        assert "colours" not in record.prediction
        assert "<" not in record.prediction
    assert stop_ids(small_processor()) == [TOKENIZER.eos_token_id]


def processor_with(template: str):
    processor = small_processor()
    processor.template = TEMPLATES[template]
    return processor


@pytest.mark.parametrize("template", ["shipped", "plain"])
def test_generation_stops_at_the_token_that_ends_every_learned_answer(template):
    processor = processor_with(template)
    ends = {int(processor.prepare(Pages()[i]).labels[-1]) for i in range(12)}
    assert len(ends) == 1
    assert set(stop_ids(processor)) == ends | {TOKENIZER.eos_token_id}


def test_a_template_of_captions_generates_until_its_line_break():
    model, processor = small_model(), processor_with("plain")
    (line_break,) = set(stop_ids(processor)) - {TOKENIZER.eos_token_id}
    steps = []

    def break_the_line(module, args, output):
        steps.append(1)
        output.logits[..., line_break] = output.logits.max() + 1

    model.register_forward_hook(break_the_line)
    assert generate(model, processor, [Pages()[0]], 6) == [""]
    assert len(steps) == 1


def test_a_template_that_writes_a_line_break_after_its_end_token_stops_at_the_token():
    processor = processor_with("shipped")
    processor.template = replace(TEMPLATES["shipped"], assistant_suffix="<assistant>\n")
    assert stop_ids(processor) == sorted([TOKENIZER.eos_token_id, TOKENIZER.convert_tokens_to_ids("<assistant>")])


def test_a_line_break_that_is_two_tokens_by_itself_is_found_behind_an_answer(monkeypatch):
    """As in SentencePiece tokenizers, which put a space before what they are given."""
    processor = processor_with("plain")
    ids = {"a": [7, 70], "a\n": [7, 70, 13], "\n": [7, 13], "": []}
    monkeypatch.setattr(type(TOKENIZER), "encode", lambda self, text, **kwargs: ids[text])
    assert stop_ids(processor) == [TOKENIZER.eos_token_id, 13]


def test_the_first_samples_are_chosen_and_no_more_than_there_are():
    results = evaluate(small_model(), small_processor(), Pages(5), CONFIG, 100)
    assert [r.key for r in results.records] == [f"page {i}" for i in range(5)]


def test_evaluation_leaves_modes_gradients_and_random_numbers_alone():
    model = small_model().train()
    model.vision_tower.eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    evaluate(model, small_processor(), Pages(), CONFIG, 4)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_modes_come_back_after_a_failure():
    model = small_model().train()
    with pytest.raises(ValueError, match="ends without an answer"):
        evaluate(model, small_processor(), Unanswered(), CONFIG, 4)
    assert all(m.training for m in model.modules())


class Unanswered(Pages):
    def __getitem__(self, index):
        record = super().__getitem__(index)
        return replace(record, turns=record.turns[:-1])


def test_a_sample_without_facts_is_scored_as_a_whole():
    class Whole(Pages):
        def __getitem__(self, index):
            return replace(super().__getitem__(index), facts=())

    (record,) = evaluate(small_model(), small_processor(), Whole(), CONFIG, 1).records
    assert record.facts == (record.answer,)
    assert len(record.correct) == 1


def test_progress_reaches_its_end():
    with Progress(disable=True) as progress:
        evaluate(small_model(), small_processor(), Pages(), CONFIG, 6, progress)
        assert progress.tasks[0].finished


@pytest.mark.parametrize(("samples", "batch_size"), [(0, 4), (4, 0)])
def test_nothing_to_evaluate_is_refused(samples, batch_size):
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(small_model(), small_processor(), Pages(), replace(CONFIG, batch_size=batch_size), samples)


def test_text_only_questions_are_answered_too():
    record = Pages()[0]
    plain = replace(record, images=(), turns=(Turn(Role.user, "Which colours?"), record.turns[-1]))
    assert len(generate(small_model(), small_processor(), [plain, record], 3)) == 2
