"""Where a generated answer ends."""

from transformers import PreTrainedTokenizerFast

from deepstack_pl.language.template import Template


def stop_ids(tokenizer: PreTrainedTokenizerFast, template: Template) -> list[int]:
    """Tokens that end an answer: the tokenizer's own end, and the template's, which may be another one."""
    own, suffix = tokenizer.eos_token_id, template.assistant_suffix
    found = {own} if isinstance(own, int) else set()
    for text in (suffix, suffix.strip()):  # a suffix may be a token and a line break, or a line break alone
        # After a letter, as in an answer: by itself a line break is two tokens to some tokenizers.
        answer, ended = (tokenizer.encode(t, add_special_tokens=False) for t in ("a", f"a{text}"))
        end = ended[len(answer) :]
        if ended[: len(answer)] == answer and len(end) == 1 and end[0] != tokenizer.unk_token_id:
            return sorted(found | {end[0]})
    return sorted(found)
