"""The README.md of an exported folder: what it was built from, whose licences hold, how it is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from deepstack_pl.multimodal.configuration import DeepStackConfig
from deepstack_pl.multimodal.proof import QUESTION, Proof


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a model comes from, as far as is known.

    Attributes:
        run: the folder's name.
        weights: what each part's weights began as and their licence, by the part's name.
        data: what it was trained on.
        receipt: digest of the run's receipt; None where there is none.
        versions: of the packages that exported it.
    """

    run: str
    weights: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    data: str | None = None
    receipt: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


def card(config: DeepStackConfig, origin: Origin, proofs: list[Proof]) -> str:
    """The text of README.md."""
    plan = config.typed_plan()
    rows = [f"| {part} | {name} | {licence} |" for part, (name, licence) in origin.weights.items()]
    built = ["| part | weights began as | licence |", "|---|---|---|", *rows] if rows else ["Not on record."]
    adapters = ", ".join(config.lora)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "tags: [deepstack, vision-language]",
        "---",
        f"# {origin.run}",
        "",
        "A DeepStack vision-language model (Meng et al., 2024, https://arxiv.org/abs/2406.04334), exported by "
        "`deepstack export`.",
        "",
        "## Built from",
        "",
        *built,
        "",
        "The licences of these weights, and of the data, hold for what was made of them. "
        + (f"Trained on: {origin.data}." if origin.data else "What it was trained on is not on record."),
        "",
        "## Plan",
        "",
        "```",
        plan.draw(),
        "```",
        "",
        f"Digest of the plan {plan.digest}; of the run's receipt {origin.receipt or '(none was taken)'}.",
        *([f"Adapters (LoRA) stand beside the weights of: {adapters}. peft loads them."] if adapters else []),
        "",
        "## Loading",
        "",
        "```python",
        SNIPPET,
        "```",
        "",
        "## Proven when it was exported",
        "",
        *(f"- {proof.claim}: {proof.found}" for proof in proofs),
        "",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in origin.versions.items()) + ".",
    ]
    return "\n".join(lines) + "\n"


SNIPPET = f'''\
from transformers import AutoModelForImageTextToText, AutoProcessor

import deepstack_pl.multimodal.auto  # registers the classes

model = AutoModelForImageTextToText.from_pretrained(".")  # this folder
processor = AutoProcessor.from_pretrained(".")
question = [{{"type": "image", "image": "page.png"}}, {{"type": "text", "text": "{QUESTION}"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": question}}], add_generation_prompt=True, tokenize=True, return_dict=True
)
ids = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(ids[0, inputs["input_ids"].shape[1] :]))'''
