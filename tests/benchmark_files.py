"""Tiny replicas of benchmarks, files and pictures, in the layout in which they are published."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from deepstack_pl.evaluation.config import TaskConfig

CONF = Path(__file__).parents[1] / "conf" / "evaluation"
COLOURS = ("red", "green", "blue", "white", "black", "orange")
ABILITIES = {"Scene Understanding": 1, "Instance Identity": 2, "Action Recognition": 10}


def write_benchmark(name: str, folder: Path, samples: int = 6) -> TaskConfig:
    """Write the benchmark ``name`` with ``samples`` questions, two to a picture, into ``folder``.

    Question ``i`` is about picture ``i // 2``, of which it asks the colour where the benchmark asks for words. The
    values are those of conf/evaluation, with ``folder`` as the root.
    """
    values = yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))["tasks"][name]
    config = TaskConfig(**(values | {"root": str(folder)}))
    WRITERS[name](config, samples)
    return config


def colour(picture: int) -> str:
    """The colour of a picture."""
    return COLOURS[picture % len(COLOURS)]


def _asked(place: int) -> str:
    return f"What colour is it, version {place}?"


def _picture(config: TaskConfig, name: str, number: int) -> str:
    file = Path(config.root, config.images, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (64, 48), colour(number))
    image.save(file, format="PNG" if file.suffix == ".png" else "JPEG")
    return name


def _write(config: TaskConfig, name: str, values: Any) -> None:
    file = Path(config.root, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values), encoding="utf-8")


def _textvqa(config: TaskConfig, samples: int) -> None:
    data = []
    for place in range(samples):
        image = f"{place // 2:016x}"
        _picture(config, f"{image}.jpg", place // 2)
        answers = [colour(place // 2)] * 8 + ["unanswerable", "a colour"]
        record = {"question_id": 34602 + place, "image_id": image, "question": _asked(place), "answers": answers}
        data.append(record | {"set_name": "val", "image_width": 64, "image_height": 48, "question_tokens": ["what"]})
    _write(config, config.questions[0], {"dataset_type": "val", "dataset_name": "textvqa", "data": data})
    ocr = [{"image_id": image, "ocr_tokens": ["STOP", image[-1]], "ocr_info": []} for image in _images(data)]
    _write(config, "TextVQA_Rosetta_OCR_v0.2_val.json", {"dataset_type": "val", "data": ocr})


def _images(data: list[dict[str, Any]]) -> list[str]:
    return sorted({record["image_id"] for record in data})


def _chartqa(config: TaskConfig, samples: int) -> None:
    parts: list[list[dict[str, str]]] = [[] for _ in config.questions]
    for place in range(samples):
        image = _picture(config, f"multi_col_{place // 2}.png", place // 2)
        label = colour(place // 2) if place % 2 else str(10 + place)
        parts[place % len(parts)].append({"imgname": image, "query": _asked(place), "label": label})
    for name, part in zip(config.questions, parts, strict=True):
        _write(config, name, part)


def _docvqa(config: TaskConfig, samples: int) -> None:
    data = []
    for place in range(samples):
        image = _picture(config, f"ffbf{place // 2:04}_1.png", place // 2)
        record = {"questionId": 49153 + place, "question": _asked(place), "question_types": ["handwritten", "form"]}
        record |= {"image": f"documents/{image}", "docId": 14465, "ucsf_document_id": "ffbf", "data_split": "val"}
        data.append(record | {"answers": [colour(place // 2), f"{colour(place // 2)} paper"]})
    _write(config, config.questions[0], {"dataset_name": "SP-DocVQA", "dataset_split": "val", "data": data})


def _infovqa(config: TaskConfig, samples: int) -> None:
    data = []
    for place in range(samples):
        image = _picture(config, f"{10000 + place // 2}.jpeg", place // 2)
        record = {"questionId": 98313 + place, "question": _asked(place), "image_local_name": image}
        record |= {"answer_type": ["single span"], "operation/reasoning": [], "ocr_output_file": f"{image}.json"}
        data.append(record | {"answers": [colour(place // 2)], "data_split": "val"})
    _write(config, config.questions[0], {"dataset_name": "infographicVQA", "dataset_split": "val", "data": data})


def _vqav2(config: TaskConfig, samples: int) -> None:
    questions, annotations = [], []
    for place in range(samples):
        _picture(config, f"COCO_val2014_{place // 2:012}.jpg", place // 2)
        ids = {"image_id": place // 2, "question_id": 262148000 + place}
        said = "yes" if place % 2 else colour(place // 2)
        answers = [{"answer": said, "answer_confidence": "yes", "answer_id": number} for number in range(1, 11)]
        kind = "yes/no" if place % 2 else "other"
        questions.append({**ids, "question": _asked(place)})
        annotations.append(
            {**ids, "question_type": "what", "answer_type": kind, "multiple_choice_answer": said, "answers": answers}
        )
    head = {"info": {"version": "2.0"}, "data_type": "mscoco", "data_subtype": "val2014"}
    _write(config, config.questions[0], {**head, "task_type": "Open-Ended", "questions": questions})
    _write(config, config.annotations[0], {**head, "annotations": annotations})


def _gqa(config: TaskConfig, samples: int) -> None:
    found = {}
    for place in range(samples):
        image = f"n{161313 + place // 2}"
        _picture(config, f"{image}.jpg", place // 2)
        found[f"{201307251 + place}"] = {
            "question": _asked(place), "answer": colour(place // 2), "imageId": image, "isBalanced": True,
            "fullAnswer": f"It is {colour(place // 2)}.", "types": {"structural": "query"}, "semantic": [],
        }  # fmt: skip
    _write(config, config.questions[0], found)


def _pope(config: TaskConfig, samples: int) -> None:
    parts: list[list[dict[str, Any]]] = [[] for _ in config.questions]
    for place in range(samples):
        image = _picture(config, f"COCO_val2014_{place // 2:012}.jpg", place // 2)
        part, thing = parts[place % len(parts)], colour(place // 2) if place % 2 else "purple"
        text = f"Is there a {thing} surface in the image?"
        label = "yes" if place % 2 else "no"
        part.append({"question_id": len(part) + 1, "image": image, "text": text, "label": label})
    for name, part in zip(config.questions, parts, strict=True):
        file = Path(config.root, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(record) + "\n" for record in part), encoding="utf-8")


def _seed(config: TaskConfig, samples: int) -> None:
    questions = []
    for place in range(samples):
        image = _picture(config, f"1454426_{2591111986 + place // 2}", place // 2)
        wrong = [other for other in COLOURS if other != colour(place // 2)]
        choices = [*wrong[: place % 4], colour(place // 2), *wrong[place % 4 :]][:4]
        questions.append(_seed_question(place, choices, image, "image", 1 + place % 2))
    video = _seed_question(samples, ["one", "two", "three", "four"], "SSV2/83.webm", "video", 10)
    _write(config, config.questions[0], {"questions": [*questions, video], "question_type": ABILITIES})


def _seed_question(place: int, choices: list[str], data: str, data_type: str, ability: int) -> dict[str, Any]:
    options = {f"choice_{letter}": text for letter, text in zip("abcd", choices, strict=True)}
    answer = "ABCD"[place % 4]
    ids = {"data_id": data, "data_type": data_type, "question_id": f"{101669 + place}", "question_type_id": ability}
    return {"answer": answer, **options, **ids, "question": _asked(place)}


WRITERS: dict[str, Callable[[TaskConfig, int], None]] = {
    "textvqa": _textvqa,
    "chartqa": _chartqa,
    "docvqa": _docvqa,
    "infovqa": _infovqa,
    "vqav2": _vqav2,
    "gqa": _gqa,
    "pope": _pope,
    "seed": _seed,
}
