"""Loads and questions a folder with whatever transformers is first on the path, and says which. A program."""

import sys
import tempfile
from pathlib import Path

import torch
import transformers
from saved import CHATS, save
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import deepstack_pl.multimodal.auto  # noqa: F401 - registers the classes

wanted = sys.argv[1]
assert transformers.__version__ == wanted, f"{transformers.__version__} was imported, not {wanted}"
with tempfile.TemporaryDirectory() as name:
    folder = save(Path(name))
    assert AutoConfig.from_pretrained(folder).model_type == "deepstack_pl"
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
string = processor.apply_chat_template(CHATS[3], add_generation_prompt=True)
text = [
    {**m, "content": m["content"] if isinstance(m["content"], str) else [{**p, "image": ""} for p in m["content"]]}
    for m in CHATS[3]
]
assert tokenizer.apply_chat_template(text, add_generation_prompt=True, tokenize=False) == string
chat = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
inputs = processor.apply_chat_template(CHATS, **chat)
length, greedy = inputs["input_ids"].shape[1], {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
with torch.no_grad():
    without = model(**(inputs | {"group_rows": torch.full_like(inputs["group_rows"], -1)})).logits[:, -1]
    changed = (model(**inputs).logits[:, -1] - without).abs().amax(1) > 1e-4
assert changed.tolist() == [True, False, True, True], (
    "injections change what is said where an image stands, and only there"
)
alone = []
for messages in CHATS:
    one = processor.apply_chat_template(messages, **chat)
    alone.append(model.generate(**one, **greedy)[:, one["input_ids"].shape[1] :])
for how in (
    {},
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"prefill_chunk_size": 1},
    {"prefill_chunk_size": 7},
):
    assert torch.equal(model.generate(**inputs, **greedy, **how)[:, length:], torch.cat(alone)), how
beams = model.generate(**inputs, **greedy, num_beams=3, num_return_sequences=2)[:, length:]
assert torch.equal(
    beams, model.generate(**inputs, **greedy, num_beams=3, num_return_sequences=2, prefill_chunk_size=4)[:, length:]
)
print(f"transformers {wanted}: loads, answers, cached = uncached = in chunks = one by one")
