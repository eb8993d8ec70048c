"""Compiles the forward and holds it to itself uncompiled. A program: types checked at run time cannot be compiled."""

import torch
from tiny import MIXED, PLANS, batch_of, tiny_model
from torch._dynamo.testing import CompileCounterWithBackend

BATCHES = [MIXED, [MIXED[1], MIXED[3]], MIXED[1:] * 2, MIXED[2:], [MIXED[0], MIXED[2]]]


def close(compiled: torch.nn.Module, model: torch.nn.Module, inputs: dict) -> None:
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=2e-5, rtol=1e-4)


torch.set_num_threads(1)
for name in ("deepstack_l", "deepstack_lv"):
    for backend in ("eager", "aot_eager"):
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
        assert graphs == [1, 2, 2, 2, 2, 3, 4, 4], (name, backend, graphs)  # each kind twice: the second is dynamic
