"""Templates: the strings around the turns of a conversation, as values, and the string they make.

vicuna_v1, phi3_instruct and plain (method C.5) give the published code's prompts to the letter, but for several images
in one turn: there only one survives, here all stay where they were written. The other families' are those of their
tokenizers' chat templates (docs/llms.md). A leading assistant turn is dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

from deepstack_pl.batch import Role, Turn

IMAGE = "<image>"


class UserText(Enum):
    """What becomes of a user's text."""

    as_written = "as_written"
    image_first = "image_first"  # a turn's only image goes before its text, on a line of its own, as published
    images_only = "images_only"  # the text is dropped: captions are learned from the images alone


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """The strings around the turns, in the order they are written.

    Attributes:
        answer_lead: between the prompt and an answer's first word; learned with the answer, so that " red" is the
            token that generation starts with.
        assistant_suffix: ends an answer; learned.
        marks: the special tokens in the strings above; each must be one token of the tokenizer.
        between: from an answer's end to the next turn; not learned.
        trimmed: whose texts lose the white space at their ends, where the family's own template takes it away.
        bos: the ids start with the tokenizer's beginning-of-sequence token, which ``render`` leaves out.
    """

    name: str
    system: str = ""
    user_prefix: str = ""
    user_suffix: str = ""
    assistant_prefix: str = ""
    answer_lead: str = ""
    assistant_suffix: str = ""
    between: str = ""
    trimmed: tuple[Role, ...] = ()
    marks: tuple[str, ...] = ()
    bos: bool = True
    user_text: UserText = UserText.as_written


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template(
            name="shipped",
            user_prefix="<user>",
            assistant_prefix="<assistant>",
            answer_lead=" ",
            assistant_suffix="<eos>",
            marks=("<user>", "<assistant>", "<eos>"),
        ),
        Template(
            name="vicuna_v1",
            system="A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
            user_prefix="USER: ",
            user_suffix=" ",
            assistant_prefix="ASSISTANT:",
            answer_lead=" ",
            assistant_suffix="</s>",
            marks=("</s>",),
            user_text=UserText.image_first,
        ),
        Template(
            name="phi3_instruct",
            system="<|system|>\nYou are a helpful AI assistant.<|end|>",
            user_prefix="\n<|user|>\n",
            user_suffix="<|end|>",
            assistant_prefix="\n<|assistant|>\n",
            assistant_suffix="<|end|>",
            marks=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
            user_text=UserText.image_first,
        ),
        Template(
            name="llama3",
            user_prefix="<|start_header_id|>user<|end_header_id|>\n\n",
            user_suffix="<|eot_id|>",
            assistant_prefix="<|start_header_id|>assistant<|end_header_id|>\n\n",
            assistant_suffix="<|eot_id|>",
            trimmed=(Role.user, Role.assistant),
            marks=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            user_text=UserText.image_first,
        ),
        # Without thinking: every answer stands behind the empty block that it is generated from.
        Template(
            name="qwen3",
            user_prefix="<|im_start|>user\n",
            user_suffix="<|im_end|>\n",
            assistant_prefix="<|im_start|>assistant\n<think>\n\n</think>\n\n",
            assistant_suffix="<|im_end|>",
            between="\n",
            marks=("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
            bos=False,
            user_text=UserText.image_first,
        ),
        Template(
            name="smollm2",
            system="<|im_start|>system\n"
            "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n",
            user_prefix="<|im_start|>user\n",
            user_suffix="<|im_end|>\n",
            assistant_prefix="<|im_start|>assistant\n",
            assistant_suffix="<|im_end|>",
            between="\n",
            marks=("<|im_start|>", "<|im_end|>"),
            bos=False,
            user_text=UserText.image_first,
        ),
        Template(
            name="mistral_v3",
            user_prefix="[INST] ",
            user_suffix="[/INST]",
            answer_lead=" ",
            assistant_suffix="</s>",
            trimmed=(Role.assistant,),
            marks=("[INST]", "[/INST]", "</s>"),
            user_text=UserText.image_first,
        ),
        Template(
            name="gemma3",
            user_prefix="<start_of_turn>user\n",
            user_suffix="<end_of_turn>\n",
            assistant_prefix="<start_of_turn>model\n",
            assistant_suffix="<end_of_turn>",
            between="\n",
            trimmed=(Role.user, Role.assistant),
            marks=("<start_of_turn>", "<end_of_turn>"),
            user_text=UserText.image_first,
        ),
        Template(name="plain", assistant_suffix="\n", user_text=UserText.images_only),
    )
}


@dataclass(frozen=True, slots=True)
class Span:
    """Text that is given or learned as a whole. ``own`` are the template's own parts, as offsets into ``text``; where
    it is ``plain``, ``<image>`` is a word of it.
    """

    turn: int
    learned: bool
    text: str
    own: tuple[tuple[int, int], ...]
    plain: bool = False


def render(turns: Sequence[Turn], template: Template) -> str:
    """The string that ``encode`` tokenises, for people."""
    return "".join(span.text for span in spans_of(turns, template))


def render_prompt(turns: Sequence[Turn], template: Template) -> str:
    """The string that ``encode_prompt`` tokenises, for people."""
    return "".join(span.text for span in prompt_spans(turns, template))


def _numbered(turns: Sequence[Turn]) -> list[tuple[int, Turn]]:
    """Turns with their places, without a leading assistant turn; users and assistants must alternate."""
    numbered = list(enumerate(turns))
    if numbered and turns[0].role is Role.assistant:
        numbered = numbered[1:]
    if not numbered:
        raise ValueError(f"The conversation has no user turn among its {len(turns)}. Give it a question.")
    for (_, before), (place, turn) in pairwise(numbered):
        if turn.role is before.role:
            raise ValueError(f"Turns {place - 1} and {place} are both by the {turn.role.value}. Join them into one.")
    if numbered[0][1].role is not Role.user:
        raise ValueError("Turns 0 and 1 are both by the assistant. Join them into one.")
    return numbered


def spans_of(turns: Sequence[Turn], template: Template) -> list[Span]:
    """The rendered string, question by answer; a question's span holds what stands before and after it."""
    spans = []
    for place, turn in _numbered(turns):
        said = turn.text.strip() if turn.role in template.trimmed else turn.text
        if turn.role is Role.user:
            before = (template.between if spans else template.system) + template.user_prefix
            text, after = _user_text(place, said, template), template.user_suffix + template.assistant_prefix
        else:
            before, text, after = template.answer_lead, said, template.assistant_suffix
        whole = before + text + after
        own = ((0, len(before)), (len(whole) - len(after), len(whole)))
        spans.append(Span(place, turn.role is Role.assistant, whole, own, turn.plain))
    return spans


def prompt_spans(turns: Sequence[Turn], template: Template) -> list[Span]:
    """The same up to the last question."""
    spans = spans_of(turns, template)
    return spans[:-1] if spans[-1].learned else spans


def _user_text(place: int, text: str, template: Template) -> str:
    images = text.count(IMAGE)
    match template.user_text:
        case UserText.image_first if images == 1:
            return f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip()
        case UserText.images_only:
            if not images:
                raise ValueError(
                    f"Turn {place} (user), {text!r}, has no {IMAGE}, and template {template.name!r} keeps nothing else "
                    "of it. Choose another llm.template for such conversations."
                )
            return IMAGE * images
        case _:
            return text
