"""The model ``deepstack_pl`` of lmms-eval (0.7), the program of the published evaluation (paper, section 4.1).

``python -m lmms_eval --model deepstack_pl --model_args pretrained=FOLDER,conv_template=phi3_instruct --tasks ...``. Its
newer tasks hand over messages (`DeepStackChat`); those that rank choices by likelihood a context and pictures
(`DeepStackSimple`, ``--force_simple``). lmms-eval shares samples out over the processes that accelerate starts.
"""

import difflib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from deepstack_pl.batch import IGNORE_INDEX, MultimodalBatch, PadSide, Record, Role, Turn
from deepstack_pl.evaluation.lmms_settings import (
    OF_OTHERS,
    alike,
    batches,
    before,
    number,
    settings_of,
    stops_of,
    whole_number,
)
from deepstack_pl.evaluation.runner import evaluating, generate, no_room
from deepstack_pl.language.conversation import IMAGE
from deepstack_pl.multimodal.chat import read_messages
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.vision.views import as_rgb

_DTYPES = ("float32", "bfloat16", "float16")
_DEFAULT_LENGTH = 1024  # lmms-eval's own for LLaVA, where a task sets none


class _DeepStack(lmms):
    """What both have in common."""

    def __init__(
        self,
        pretrained: str = "",
        conv_template: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        attn_implementation: str | None = None,
        injections: bool = True,
        **unknown: Any,
    ) -> None:
        """``--model_args``: ``pretrained`` a run's or an exported folder; ``conv_template`` what the model must have
        learned (``vicuna_v1``, ``phi3_instruct``, ...); ``dtype`` as saved unless given; ``injections=False`` stacks
        nothing.

        Raises:
            ValueError: an argument that there is not, or that does not fit the model.
        """
        super().__init__()
        known = ("pretrained", "conv_template", "device", "dtype", "batch_size", "attn_implementation", "injections")
        if unknown:
            name = next(iter(unknown))
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else f" There are {', '.join(known)}."
            raise ValueError(f"--model_args {name}={unknown[name]}: no such argument of deepstack_pl.{hint}")
        if dtype is not None and dtype not in _DTYPES:
            raise ValueError(f"--model_args dtype={dtype}: use {', '.join(_DTYPES)}, or leave it out: as it is saved.")
        if max_batch_size is not None:
            raise ValueError(
                f"--max_batch_size {max_batch_size}: batches are as large as --batch_size says. Leave it out."
            )
        if injections not in (True, False):
            raise ValueError(f"--model_args injections={injections}: use True or False.")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"--batch_size {batch_size}: so many questions at once, 1 or more.")
        if not (Path(pretrained) / "config.json").is_file():
            raise ValueError(
                f"--model_args pretrained={pretrained}: no model lies there (config.json is missing). Give a finished "
                "run's folder, or one of deepstack export."
            )
        self.processor = DeepStackProcessor.from_pretrained(pretrained)
        learned = self.processor.template.name
        if conv_template is not None and conv_template != learned:
            raise ValueError(
                f"--model_args conv_template={conv_template}: the model in {pretrained} learned {learned}, and "
                f"would be asked in another way than it was taught. Say conv_template={learned}, or leave it out."
            )
        self.accelerator = Accelerator(cpu=device == "cpu")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        alone = self._world_size == 1 and device is not None
        self.device = torch.device(str(device)) if alone else self.accelerator.device
        options: dict[str, Any] = {} if dtype is None else {"dtype": getattr(torch, dtype)}
        if attn_implementation is not None:
            options["attn_implementation"] = attn_implementation
        model = DeepStackForConditionalGeneration.from_pretrained(pretrained, **options)
        self.model: DeepStackForConditionalGeneration = model.to(self.device).eval()
        self.batch_size, self.injections = int(batch_size), injections
        self._told: set[str] = set()

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("deepstack_pl answers one round: leave tasks of several rounds out.")

    @abstractmethod
    def asked(self, request: Instance) -> Record:
        """The question of a request of generation."""

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """An answer to each request, in their order. Batched: those of equal settings, of like length."""
        found: dict[int, GenerationResult] = {}
        settings = [settings_of(request) for request in requests]
        order = sorted(range(len(requests)), key=lambda place: (alike(settings[place]), -len(requests[place].args[0])))
        with tqdm(total=len(requests), disable=self._rank > 0, desc="deepstack_pl") as bar:
            for places in batches(order, self.batch_size, lambda place: alike(settings[place])):
                chosen = settings[places[0]]
                self._tell(chosen)
                records = [self.asked(requests[place]) for place in places]
                for record in records:
                    self._room(record)
                answers = generate(
                    self.model,
                    self.processor,
                    records,
                    whole_number(chosen.get("max_new_tokens", _DEFAULT_LENGTH), "max_new_tokens"),
                    injections=self.injections,
                    **self._options(chosen),
                )
                for place, answer in zip(places, answers, strict=True):
                    text = before(answer, stops_of(chosen))
                    tokens = len(self.processor.tokenizer(answer, add_special_tokens=False).input_ids)
                    found[place] = GenerationResult(text, TokenCounts(output_tokens=tokens))
                    self.cache_hook.add_partial("generate_until", (requests[place].args[0], chosen), text)
                bar.update(len(places))
        return [found[place] for place in range(len(requests))]

    def _options(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings as `generate` of transformers has them; greedy where a temperature of 0 is asked for."""
        temperature = number(settings.get("temperature") or 0, "temperature")
        sampled = bool(settings.get("do_sample", temperature > 0)) and temperature > 0
        if settings.get("do_sample") and not sampled:
            self._say("do_sample", "do_sample without a temperature above 0 is greedy.")
        options: dict[str, Any] = {"do_sample": sampled}
        read = ("temperature", "top_p", "top_k") if sampled else ()
        options |= {name: settings[name] for name in read if settings.get(name) is not None}
        if settings.get("num_beams") is not None:
            options["num_beams"] = whole_number(settings["num_beams"], "num_beams")
        if stops := stops_of(settings):
            options |= {"stop_strings": stops, "tokenizer": self.processor.tokenizer}
        return options

    def _tell(self, settings: dict[str, Any]) -> None:
        """Once for each setting of a task that means nothing here."""
        for name in sorted(OF_OTHERS & {*settings}):
            self._say(name, f"{name}={settings[name]} is not read: the plan says how pictures are seen.")

    def _say(self, about: str, sentence: str) -> None:
        if about not in self._told and self._rank == 0:
            print(f"deepstack_pl: {sentence}")
        self._told.add(about)

    def _room(self, record: Record) -> None:
        """Raises: ValueError: the question does not fit the model's context."""
        too_long = no_room(self.processor, record)
        if too_long is not None:
            raise ValueError(f"{too_long} lmms-eval has no way to leave a sample out: leave its task out, or --limit.")

    def _record(self, key: str, turns: Sequence[Turn], pictures: Iterable[Any]) -> Record:
        return Record(key=key, turns=tuple(turns), images=tuple(_picture(each, key) for each in pictures))


class DeepStackChat(_DeepStack):
    """Asked in messages."""

    is_simple = False

    def asked(self, request: Instance) -> Record:
        args: Any = request.args
        _, to_messages, _, doc, task, split = args
        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][doc])).to_hf_messages()
        pictures = [part["image"] for part in _parts(messages) if part["type"] == "image"]
        placed = sum(part["text"].count(IMAGE) for part in _parts(messages) if part["type"] == "text")
        if placed and placed == len(pictures):  # the text says where they stand: the parts need not
            messages = [{**m, "content": [p for p in m["content"] if p["type"] != "image"]} for m in messages]
        try:
            turns, _ = read_messages(messages)
        except ValueError as error:
            raise ValueError(f"task {task}, sample {doc}: {error}") from error
        return self._record(f"{task}/{doc}", turns, pictures)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("lmms-eval ranks choices by likelihood for simple models alone: add --force_simple.")


class DeepStackSimple(_DeepStack):
    """Asked by a context and pictures, which stand before it where it does not say where."""

    is_simple = True

    def asked(self, request: Instance) -> Record:
        args: Any = request.args
        context, _, to_pictures, doc, task, split = args
        return self._with_context(context, to_pictures, doc, task, split)

    def loglikelihood(self, requests: list[Instance]) -> list[Any]:
        """For each continuation of a context its mean loss over its tokens and the one that ends an answer, and whether
        it is what the model would say. (A loss and no likelihood: lmms-eval takes the choice with the lowest number for
        the likeliest, because LLaVA's adapter gave losses.)
        """
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda place: -len(requests[place].args[0]))
        with tqdm(total=len(requests), disable=self._rank > 0, desc="deepstack_pl") as bar, evaluating(self.model):
            for places in batches(order, self.batch_size, lambda place: ""):
                samples = [self.processor.prepare(self._answered(requests[place])) for place in places]
                for sample in samples:
                    if sample.cut:
                        raise ValueError(
                            f"sample {sample.key!r} takes {len(sample.input_ids) + sample.cut} positions, but the "
                            f"model {self.processor.max_length}. Nothing is cut in evaluation: leave its task out."
                        )
                batch = self.processor.collate(samples, PadSide.right).to(self.device)
                for place, likely in zip(places, self._losses(batch), strict=True):
                    found[place] = likely
                    self.cache_hook.add_partial("loglikelihood", requests[place].args[:2], likely)
                bar.update(len(places))
        # lmms-eval 0.7.3 makes a string of any pair that is not wrapped, and then fails on it.
        wrapped: Any = GenerationResult
        return [wrapped(found[place]) for place in range(len(requests))]

    def _losses(self, batch: MultimodalBatch) -> list[tuple[float, bool]]:
        inputs = batch.model_inputs()
        if not self.injections:
            inputs |= {name: torch.full_like(inputs[name], -1) for name in ("group_rows", "vit_rows")}
        labels = inputs.pop("labels")
        logits: Float[Tensor, "b t v"] = self.model(**inputs, use_cache=False).logits
        return [_of_row(each, own) for each, own in zip(logits, labels, strict=True)]

    def _answered(self, request: Instance) -> Record:
        args: Any = request.args
        context, said, to_pictures, doc, task, split = args
        text = said(self.task_dict[task][split][doc]) if callable(said) else said
        asked = self._with_context(context, to_pictures, doc, task, split)
        if not str(text).strip():
            raise ValueError(f"task {task}, sample {doc}: an empty continuation has no likelihood. Leave the task out.")
        return Record(key=asked.key, turns=(*asked.turns, Turn(Role.assistant, str(text).strip())), images=asked.images)

    def _with_context(self, context: str, to_pictures: Callable[..., Any], doc: int, task: str, split: str) -> Record:
        pictures = list(to_pictures(self.task_dict[task][split][doc]) or [])
        lead = "" if IMAGE in context or not pictures else " ".join([IMAGE] * len(pictures)) + "\n"
        return self._record(f"{task}/{doc}", [Turn(Role.user, lead + context)], pictures)


def _of_row(logits: Float[Tensor, "t v"], labels: Int[Tensor, " t"]) -> tuple[float, bool]:
    """The mean loss of the learned tokens of one row, and whether each is likeliest."""
    at = (labels[1:] != IGNORE_INDEX).nonzero().squeeze(1)
    own, before = labels[at + 1], logits[at].float()
    return float(cross_entropy(before, own)), bool((before.argmax(-1) == own).all())


def _parts(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [part for message in messages for part in message["content"]]


def _picture(given: Any, key: str) -> Image.Image:
    if not isinstance(given, Image.Image):
        raise ValueError(
            f"{key}: a picture is given as {type(given).__name__}, but pictures come decoded from a data set, and "
            "nothing is fetched. Leave the task out; sound and video are not taken at all."
        )
    return as_rgb(given)
