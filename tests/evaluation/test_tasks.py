"""Benchmarks read from replicas of their published files, and every way in which such a file is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import CONF, WRITERS, write_benchmark

from deepstack_pl.evaluation.tasks import seed
from deepstack_pl.evaluation.tasks.all import TASKS, find

NAMES = sorted(WRITERS)
PHRASE = "\nAnswer the question using a single word or phrase."
FIRST = {  # key, picture, prompt, answers, kind, of the first question
    "textvqa": ("34602", "0000000000000000.jpg", "What colour is it, version 0?" + PHRASE,
                ("red",) * 8 + ("unanswerable", "a colour"), ""),
    "chartqa": ("human/0", "multi_col_0.png", "What colour is it, version 0?\nAnswer the question with a single word.",
                ("10",), "human"),
    "docvqa": ("49153", "ffbf0000_1.png", "What colour is it, version 0?" + PHRASE, ("red", "red paper"), ""),
    "infovqa": ("98313", "10000.jpeg", "What colour is it, version 0?" + PHRASE, ("red",), ""),
    "vqav2": ("262148000", "COCO_val2014_000000000000.jpg", "What colour is it, version 0?" + PHRASE, ("red",) * 10,
              "other"),
    "gqa": ("201307251", "n161313.jpg", "What colour is it, version 0?" + PHRASE, ("red",), ""),
    "pope": ("random/1", "COCO_val2014_000000000000.jpg", "Is there a purple surface in the image?" + PHRASE, ("no",),
             "random"),
    "seed": ("101669", "1454426_2591111986", "What colour is it, version 0?\nA. red\nB. green\nC. blue\nD. white\n"
             "Answer with the option's letter from the given choices directly.", ("A",), "Scene Understanding"),
}  # fmt: skip


def change(file: Path, edit: Callable[[Any], Any]) -> None:
    """Rewrite a file of JSON."""
    found = json.loads(file.read_text(encoding="utf-8"))
    edit(found)
    file.write_text(json.dumps(found), encoding="utf-8")


def test_every_benchmark_has_its_task_its_values_and_a_replica() -> None:
    assert sorted(TASKS) == NAMES
    assert {file.stem for file in CONF.glob("*.yaml")} - {"default", "final"} >= set(NAMES)
    assert all(find(name).name == name and find(name).source.startswith("https://") for name in NAMES)


def test_a_misspelt_task_is_named_with_the_near_miss_and_all_there_are() -> None:
    with pytest.raises(ValueError, match=r"'TextQA' is no benchmark\. Did you mean textvqa\? There are textvqa, char"):
        find("TextQA")
    with pytest.raises(ValueError, match=r"'xyzzy' is no benchmark\. There are textvqa"):
        find("xyzzy")


@pytest.mark.parametrize("name", NAMES)
def test_published_files_become_questions_whose_pictures_lie_in_the_images_folder(name: str, tmp_path: Path) -> None:
    config = write_benchmark(name, tmp_path, samples=7)
    questions = find(name).read(config)
    assert len(questions) == len({question.key for question in questions}) == 7
    first = questions[0]
    assert (first.key, first.image, first.prompt, first.answers, first.kind) == FIRST[name]
    assert all((tmp_path / config.images / question.image).is_file() for question in questions)
    metric = find(name).metric(0.95)
    for question in questions:
        metric.update(question, question.answers[0])
    everything = metric.compute()["all"]
    assert (everything[metric.headline], everything["samples"], everything["pictures"]) == (1.0, 7, 4)


@pytest.mark.parametrize("name", NAMES)
def test_reading_opens_no_picture(name: str, tmp_path: Path) -> None:
    config = write_benchmark(name, tmp_path, samples=2)
    assert len(find(name).read(replace(config, images="elsewhere"))) == 2


def test_ocr_tokens_stand_below_the_question_where_they_are_asked_for(tmp_path: Path) -> None:
    config = write_benchmark("textvqa", tmp_path)
    tokens = "TextVQA_Rosetta_OCR_v0.2_val.json"
    with_ocr = replace(config, ocr=True, annotations=[tokens])
    change(tmp_path / tokens, lambda found: found["data"][2].update(ocr_tokens=[]))
    asked = [question.prompt for question in find("textvqa").read(with_ocr)]
    assert asked[0] == f"What colour is it, version 0?\nReference OCR token: STOP, 0{PHRASE}"
    assert asked[4] == f"What colour is it, version 4?\nReference OCR token: {PHRASE}"
    with pytest.raises(ValueError, match=r"annotations=.* only for OCR tokens.*set ocr=true"):
        find("textvqa").read(replace(with_ocr, ocr=False))
    with pytest.raises(ValueError, match="task textvqa has no annotations: give it a list"):
        find("textvqa").read(replace(config, ocr=True))
    change(tmp_path / tokens, lambda found: found["data"].pop())
    with pytest.raises(ValueError, match=r"val\.json, record 4: no OCR of picture 0+2 in .*, or set ocr=false\."):
        find("textvqa").read(with_ocr)


def test_a_question_of_textvqa_begins_with_a_capital_and_goes_on_in_lower_case(tmp_path: Path) -> None:
    config = write_benchmark("textvqa", tmp_path)
    change(tmp_path / config.questions[0], lambda found: found["data"][0].update(question="what does the SIGN say?"))
    assert find("textvqa").read(config)[0].prompt.startswith("What does the sign say?\n")


def test_kinds_and_keys_come_from_the_names_of_files(tmp_path: Path) -> None:
    charts = find("chartqa").read(write_benchmark("chartqa", tmp_path / "chartqa", samples=4))
    assert [q.key for q in charts] == ["human/0", "human/1", "augmented/0", "augmented/1"]
    pope = find("pope").read(write_benchmark("pope", tmp_path / "pope", samples=6))
    assert [q.key for q in pope] == [f"{kind}/{n}" for kind in ("random", "popular", "adversarial") for n in (1, 2)]


def test_pictures_of_docvqa_are_found_whatever_folder_they_unpack_into(tmp_path: Path) -> None:
    config = write_benchmark("docvqa", tmp_path)
    (tmp_path / "documents").rename(tmp_path / "spdocvqa_images")
    moved = replace(config, images="spdocvqa_images")
    assert all((tmp_path / moved.images / question.image).is_file() for question in find("docvqa").read(moved))


def test_questions_about_videos_are_left_out_and_counted(tmp_path: Path) -> None:
    config = write_benchmark("seed", tmp_path, samples=5)
    assert len(find("seed").read(config)) == 5
    assert find("seed").left_out(config) == "1 of 6 questions are about videos and are not asked."
    assert find("gqa").left_out(config) == ""
    change(tmp_path / config.questions[0], lambda found: found["questions"].pop())
    assert seed.left_out(config) == ""


def test_several_files_are_read_as_one_in_order(tmp_path: Path) -> None:
    config = write_benchmark("infovqa", tmp_path, samples=2)
    more = json.loads((tmp_path / config.questions[0]).read_text(encoding="utf-8"))
    more["data"] = [record | {"questionId": record["questionId"] + 100} for record in more["data"]]
    (tmp_path / "more.json").write_text(json.dumps(more), encoding="utf-8")
    both = replace(config, questions=[*config.questions, "more.json"])
    assert [question.key for question in find("infovqa").read(both)] == ["98313", "98314", "98413", "98414"]
    with pytest.raises(ValueError, match=r"names a file twice; name each once\."):
        find("infovqa").read(replace(config, questions=config.questions * 2))


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named_with_where_to_put_it(name: str, tmp_path: Path) -> None:
    config = write_benchmark(name, tmp_path)
    (tmp_path / config.questions[0]).unlink()
    file = Path(config.questions[0]).name
    with pytest.raises(ValueError, match=rf"{file}: it cannot be read \(No such file .*\); put the published file "):
        find(name).read(config)
    with pytest.raises(ValueError, match=rf"task {name} has no questions: give it .* conf/evaluation/{name}\.yaml"):
        find(name).read(replace(config, questions=[]))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_cut_off_is_refused_at_its_place(name: str, tmp_path: Path) -> None:
    config = write_benchmark(name, tmp_path)
    file = tmp_path / config.questions[0]
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=rf"{file.name}.*: it is no JSON, or cut off \(.* column \d+\); download the"):
        find(name).read(config)
    file.write_bytes(b'{"data": "\xff"}')
    with pytest.raises(ValueError, match=rf"{file.name}: byte 10 is no UTF-8; download the published file again\."):
        find(name).read(config)
    file.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(ValueError, match=r"nested too deep|cut off"):
        find(name).read(config)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_another_structure_is_refused(name: str, tmp_path: Path) -> None:
    config = write_benchmark(name, tmp_path)
    file = tmp_path / config.questions[0]
    for text in ("3", '{"data": 3}', '{"questions": [3], "question_type": 3}', "[[]]"):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=rf"{file.name}(, line 1)?: (its structure is not|it has no ).*; download"):
            find(name).read(config)


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    config = write_benchmark("gqa", tmp_path)
    file = tmp_path / config.questions[0]
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(find("gqa").read(config)) == 6


FIELDS = [
    ("textvqa", "data", ("question_id", "image_id", "question", "answers")),
    ("chartqa", "", ("imgname", "query", "label")),
    ("docvqa", "data", ("questionId", "image", "question", "answers")),
    ("infovqa", "data", ("questionId", "image_local_name", "question", "answers")),
    ("vqav2", "questions", ("question_id", "image_id", "question")),
    ("seed", "questions", ("question_id", "data_id", "data_type", "question", "answer", "choice_c",
                           "question_type_id")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "within", "field"), [(n, w, field) for n, w, fields in FIELDS for field in fields])
def test_a_missing_or_mistyped_field_is_named_with_its_record(
    name: str, within: str, field: str, tmp_path: Path
) -> None:
    config = write_benchmark(name, tmp_path)
    file = tmp_path / config.questions[0]
    change(file, lambda found: (found[within] if within else found)[1].update({field: {"no": "value"}}))
    with pytest.raises(ValueError, match=rf"{file.name}, record 1: {field} is {{'no': 'value'}}, which is .*; downl"):
        find(name).read(config)
    change(file, lambda found: (found[within] if within else found)[1].pop(field))
    with pytest.raises(ValueError, match=rf"{file.name}, record 1: it has no {field}, which should be .*; download"):
        find(name).read(config)


def test_records_of_gqa_and_lines_of_pope_are_named_likewise(tmp_path: Path) -> None:
    config = write_benchmark("gqa", tmp_path / "gqa")
    change(Path(config.root, config.questions[0]), lambda found: found["201307252"].pop("imageId"))
    with pytest.raises(ValueError, match=r"testdev_balanced_questions\.json, record 201307252: it has no imageId"):
        find("gqa").read(config)
    config = write_benchmark("pope", tmp_path / "pope")
    file = Path(config.root, config.questions[0])
    file.write_text(file.read_text() + "\n" + file.read_text().replace('"no"', '"none"'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"random\.json, line 4: label is 'none', which is neither yes nor no; downl"):
        find("pope").read(config)


@pytest.mark.parametrize("name", NAMES)
def test_two_questions_of_one_name_are_refused(name: str, tmp_path: Path) -> None:
    config = write_benchmark(name, tmp_path)
    file = tmp_path / config.questions[0]
    if name == "chartqa":  # which names its questions by their places: two files of one kind
        (tmp_path / "again_human.json").write_bytes(file.read_bytes())
        config = replace(config, questions=[*config.questions, "again_human.json"])
    elif name == "gqa":
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace('"201307252"', '"201307251"'), encoding="utf-8")
    elif name == "pope":
        file.write_text(file.read_text(encoding="utf-8") * 2, encoding="utf-8")
    else:
        within = "questions" if name in ("vqav2", "seed") else "data"
        change(file, lambda found: found[within].insert(1, found[within][0]))
    with pytest.raises(ValueError, match=r"(record|line) \d+: .*(a second question is called|is there twice).*; downl"):
        find(name).read(config)


OUTSIDE = ["../secret.png", "/etc/picture.png", "a/../../b.png", "a\\b.png", "a\nb.png", "."]


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize(("name", "field"), [("docvqa", "image"), ("infovqa", "image_local_name")])
def test_a_picture_outside_its_folder_is_refused(name: str, field: str, outside: str, tmp_path: Path) -> None:
    config = write_benchmark(name, tmp_path)
    change(tmp_path / config.questions[0], lambda found: found["data"][2].update({field: outside}))
    with pytest.raises(ValueError, match=rf"record 2: {field} gives the picture .* no file below.*; name pictures by"):
        find(name).read(config)


@pytest.mark.parametrize(
    ("name", "within", "field"),
    [("textvqa", "data", "image_id"), ("seed", "questions", "data_id"), ("chartqa", "", "imgname")],
)
def test_an_identifier_that_climbs_out_of_the_folder_is_refused_too(
    name: str, within: str, field: str, tmp_path: Path
) -> None:
    config = write_benchmark(name, tmp_path)
    file = tmp_path / config.questions[0]
    change(file, lambda found: (found[within] if within else found)[0].update({field: "../../x"}))
    with pytest.raises(ValueError, match=rf"{file.name}, record 0: {field} gives the picture '../../x"):
        find(name).read(config)


def test_answers_that_do_not_fit_their_score_are_refused(tmp_path: Path) -> None:
    config = write_benchmark("textvqa", tmp_path / "textvqa")
    change(Path(config.root, config.questions[0]), lambda found: found["data"][3]["answers"].pop())
    with pytest.raises(ValueError, match="record 3: answers holds 9 strings, but the score needs 10; download"):
        find("textvqa").read(config)
    config = write_benchmark("docvqa", tmp_path / "docvqa")
    change(Path(config.root, config.questions[0]), lambda found: found["data"][3].update(answers=[]))
    with pytest.raises(ValueError, match="record 3: answers holds 0 strings, but the score needs at least one"):
        find("docvqa").read(config)
    config = write_benchmark("seed", tmp_path / "seed")
    change(Path(config.root, config.questions[0]), lambda found: found["questions"][3].update(answer="E"))
    with pytest.raises(ValueError, match="record 3: answer is 'E', which is none of A, B, C, D"):
        find("seed").read(config)


def test_annotations_of_vqav2_must_fit_its_questions(tmp_path: Path) -> None:
    config = write_benchmark("vqav2", tmp_path)
    file = tmp_path / config.annotations[0]
    change(file, lambda found: found["annotations"][0]["answers"].pop())
    with pytest.raises(ValueError, match=r"annotations\.json, record 0: answers holds 9 answers, but the .* 10"):
        find("vqav2").read(config)
    change(file, lambda found: found["annotations"].pop(0))
    with pytest.raises(ValueError, match=r"questions\.json, record 0: no annotation of question 262148000; give the"):
        find("vqav2").read(config)
    change(file, lambda found: found["annotations"].append(found["annotations"][0]))
    with pytest.raises(ValueError, match="record 5: a second annotation of question '262148001'"):
        find("vqav2").read(config)
    change(file, lambda found: found["annotations"][0].update(answers=["yes"] * 10))
    with pytest.raises(ValueError, match=r"record 0: answers is .*, which is no list of objects"):
        find("vqav2").read(config)
    with pytest.raises(ValueError, match="task vqav2 has no annotations: give it a list of files"):
        find("vqav2").read(replace(config, annotations=[]))
    with pytest.raises(ValueError, match="vqav2 reads no OCR"):
        find("vqav2").read(replace(config, ocr=True))


def test_an_ability_or_a_type_of_data_that_seed_does_not_list_is_refused(tmp_path: Path) -> None:
    config = write_benchmark("seed", tmp_path)
    file = tmp_path / config.questions[0]
    change(file, lambda found: found["questions"][0].update(question_type_id=99))
    with pytest.raises(ValueError, match="record 0: question_type_id is 99, which question_type does not list"):
        find("seed").read(config)
    change(file, lambda found: found["questions"][0].update(data_type="sound"))
    with pytest.raises(ValueError, match="record 0: data_type is 'sound', which is neither image nor video"):
        find("seed").read(config)
    change(file, lambda found: found.update(questions=[]))
    with pytest.raises(ValueError, match=r"SEED-Bench\.json: it holds no question that task seed can ask; download"):
        find("seed").read(config)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"textvqa", "vqav2"}))
def test_values_that_a_task_would_pass_over_are_refused(name: str, tmp_path: Path) -> None:
    config = write_benchmark(name, tmp_path)
    for values in ({"ocr": True}, {"annotations": ["x.json"]}):
        with pytest.raises(ValueError, match=rf"task {name} reads neither annotations nor OCR, but has .*; leave both"):
            find(name).read(replace(config, **values))


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_without_the_question_is_refused_and_other_braces_are_left_alone(name: str, tmp_path: Path) -> None:
    config = write_benchmark(name, tmp_path)
    with pytest.raises(ValueError, match=rf"prompt='Answer!' of task {name} does not hold {{question}}"):
        find(name).read(replace(config, prompt="Answer!"))
    asked = find(name).read(replace(config, prompt="{json} {question} {0}"))[0].prompt
    assert asked.startswith("{json} ")
    assert asked.endswith(" {0}")


def test_half_a_character_is_refused_before_a_tokenizer_sees_it(tmp_path: Path) -> None:
    config = write_benchmark("infovqa", tmp_path)
    change(tmp_path / config.questions[0], lambda found: found["data"][0].update(question="what \ud83d?"))
    with pytest.raises(ValueError, match="record 0: question holds half a character"):
        find("infovqa").read(config)
