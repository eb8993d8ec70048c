"""Compiles the forward, and offloads a model, and holds both to the model as it is.

A program, because neither goes with types that are checked at run time: those checks break a graph, and accelerate
makes an output anew from a dict.
"""

import tempfile

import torch
from tiny import MIXED, PLANS, batch_of, prompts, tiny_model
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForImageTextToText

from deepstack_pl.batch import PadSide
from deepstack_pl.language.host import assert_installed

OFFLOADED = {
    "vision_tower": "cpu",
    "projector": "disk",
    "own_projectors": "cpu",
    "gates": "cpu",
    "language_model.model.embed_tokens": "cpu",
    **{f"language_model.model.layers.{n}": "disk" if n % 2 else "cpu" for n in range(6)},
    "language_model.model.norm": "cpu",
    "language_model.model.rotary_emb": "cpu",
    "language_model.lm_head": "disk",
}

BATCHES = [MIXED, [MIXED[1], MIXED[3]], MIXED[1:] * 2, MIXED[2:], [MIXED[0], MIXED[2]]]


def close(compiled: torch.nn.Module, model: torch.nn.Module, inputs: dict) -> None:
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=2e-5, rtol=1e-4)


torch.set_num_threads(1)
for name, backend in (("deepstack_l", "eager"), ("deepstack_lv", "aot_eager")):
    torch._dynamo.reset()
    model, counter = tiny_model(PLANS[name]), CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    graphs = []
    with torch.no_grad():
        for rows in BATCHES:
            close(compiled, model, batch_of(model, rows).model_inputs())
            graphs.append(counter.frame_count)
        for rows, length in ((2, 5), (3, 9), (4, 12)):
            close(compiled, model, {"input_ids": torch.randint(1, 60, (rows, length))})
            graphs.append(counter.frame_count)
    assert graphs == [1, 2, 2, 2, 2, 3, 3, 3], (name, backend, graphs)  # the second is dynamic; text has its own

with tempfile.TemporaryDirectory() as folder:
    model = tiny_model(PLANS["deepstack_lv"])
    model.save_pretrained(folder)
    loaded = AutoModelForImageTextToText.from_pretrained(folder, device_map=OFFLOADED, offload_folder=f"{folder}/off")
    assert_installed(loaded.language_model)
    assert next(loaded.language_model.get_decoder().layers[1].parameters()).device.type == "meta", "it was offloaded"
    batch = batch_of(model, MIXED[:2], PadSide.left)
    assert torch.equal(loaded(**batch.model_inputs()).logits, model(**batch.model_inputs()).logits)
    how = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "prefill_chunk_size": 5}
    assert torch.equal(loaded.generate(**prompts(batch), **how), model.generate(**prompts(batch), **how))
