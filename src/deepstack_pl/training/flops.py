"""Model FLOPs of a training step: what the mathematics asks for, whatever the machine does besides.

Matrix products alone, two operations for each multiplication and addition, and one for each number that an injection
adds. Counted are every view that the tower runs, every projector's tokens, the real positions of every sample in the
LLM, the head at learned tokens, of a mixture's experts as many as a token is sent to. Not counted: padding,
activations that are computed again, norms, softmax, the optimiser. So padding and recomputing lower the utilisation, as
they should.

Attention is over ``n (n + 1) / 2`` pairs in a causal segment of ``n`` positions, over a window's where it slides, and
over all pairs of a view's tokens in the tower. A backward pass takes each product once for the gradient of a matrix
that learns, and once for that of its input where anything before it learns; attention's takes two for each of its two.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deepstack_pl.batch import MultimodalBatch
from deepstack_pl.language.host import decoder_layers
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.stacking.config import Host

# Dense products in half precision with sums in float32, per second, by the makers' data sheets; as the first of these
# words that stands in a device's name. Lightning's own table has the figures with sparsity for some.
PEAKS = {
    "B200": 2250e12,
    "GH200": 989.4e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165.2e12,
}


def peak_of(device: torch.device, half: bool) -> float | None:
    """What ``device`` could do in half precision; None where that is not known, or not what is computed in."""
    if device.type != "cuda" or not half:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for words, peak in PEAKS.items() if words in name), None)


class FlopsCounter:
    """Counts forward passes of ``model`` while it is attached; made once the stage has frozen what it freezes.

    The tower and the projectors are counted by the shapes that pass through them, whatever the plan lets run; the LLM
    by its batch, where padding can be told from text. Nothing waits for the device.
    """

    def __init__(self, model: DeepStackForConditionalGeneration) -> None:
        self.model = model
        self._seen = 0.0  # of the tower and the projectors, since it was last asked
        self._hooks: list[RemovableHandle] = []
        tower = model.vision_tower.tower
        blocks: list[nn.Module] = [*tower.blocks]
        inner = {id(p) for block in blocks for p in block.parameters()}
        learns = any(p.requires_grad for p in tower.parameters() if id(p) not in inner)
        first_gate = Host.vit.value in model.gates and model.gates[Host.vit.value].requires_grad
        for module in tower.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                self._watch(module, self._convolved, _times(module.weight, flows=False))
        for block in blocks:
            flows = learns or first_gate
            learns |= _learns(block)
            times = sum(_times(p, flows) for p in _matrices(block))
            self._watch(block, self._attended, times, 3 if learns or flows else 1)
        learns |= first_gate
        projectors = [p for p in (model.projector, *model.own_projectors.values()) if p is not None]
        before = learns
        for projector in projectors:
            flows = before
            for module in projector.modules():
                if isinstance(module, nn.Linear):
                    self._watch(module, self._projected, _times(module.weight, flows))
                flows |= any(parameter.requires_grad for parameter in module.parameters(recurse=False))
            learns |= flows
        others = [*model.gates.values(), *([] if model.image_newline is None else [model.image_newline])]
        learns |= any(p.requires_grad for p in others) or _learns(model.get_input_embeddings())
        self._layers, config = [], model.language_model.config.to_dict()
        for layer in decoder_layers(model.language_model):
            flows = learns
            learns |= _learns(layer)
            matrices = sum(_times(p, flows) for p in _matrices(layer)) - _idle(layer, flows, config)
            self._layers.append((matrices, 3 if learns else 1))
        head = model.get_output_embeddings()
        self._head = sum(_times(p, learns) for p in _matrices(head))
        self._read_config(config)

    def _read_config(self, config: dict[str, Any]) -> None:
        heads = config["num_attention_heads"]
        self._width = heads * (config.get("head_dim") or config["hidden_size"] // heads)
        kinds = config.get("layer_types") or ["sliding_attention"] * len(self._layers)
        window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
        self._windows = [window if kind == "sliding_attention" else None for kind in kinds]

    def of(self, batch: MultimodalBatch) -> float:
        """FLOPs of the step that ``batch`` was given to, all its forward passes since the last question included."""
        seen, self._seen = self._seen, 0.0
        positions = sum(batch.lengths)
        for (matrices, passes), window in zip(self._layers, self._windows, strict=True):
            pairs = sum(causal_pairs(length, window) for length in batch.lengths)
            seen += matrices * positions + 4 * self._width * pairs * passes
        return seen + self._head * len(batch.targets) + self._added(batch)

    def _added(self, batch: MultimodalBatch) -> float:
        """Additions: an injection's at every place for which its group has a token."""
        widths = {Host.llm: self.model.config.text_config.hidden_size, Host.vit: self.model.config.typed_vision().width}
        found, plan = 0, self.model.plan
        for host, name in ((Host.llm, "group_rows"), (Host.vit, "vit_rows")):
            groups = plan.groups(host)
            each = [batch.filled[name][groups.index(own.dealt)] for layer in plan.at(host).values() for own in layer]
            found += widths[host] * sum(each)
        return found

    def detach(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()

    def _watch(self, module: nn.Module, count: Any, *facts: float) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if torch.is_grad_enabled():  # generation is no training
                self._seen += count(args, output, *facts)

        self._hooks.append(module.register_forward_hook(hook))

    def _convolved(self, args: tuple[Tensor, ...], output: Tensor, times: float) -> float:
        return times * output.numel() / output.shape[1]  # patches: channels come second

    def _attended(self, args: tuple[Tensor, ...], output: Any, times: float, passes: int) -> float:
        views, tokens, width = args[0].shape
        return times * views * tokens + 4 * width * views * tokens**2 * passes

    def _projected(self, args: tuple[Tensor, ...], output: Tensor, times: float) -> float:
        return times * output.numel() / output.shape[-1]


def causal_pairs(length: int, window: int | None = None) -> float:
    """Pairs of positions of which the later one sees the earlier, itself included."""
    reach = length if window is None else min(length, window)
    return reach * (reach + 1) / 2 + (length - reach) * reach


def _matrices(module: nn.Module) -> Iterable[nn.Parameter]:
    """What every token is multiplied with: norms, biases and scales have one axis."""
    return (parameter for parameter in module.parameters() if parameter.ndim > 1)


def _idle(layer: nn.Module, flows: bool, config: dict[str, Any]) -> float:
    """FLOPs of the experts that a token is not sent to, which `_matrices` counts; they lie in tensors of three axes,
    the first of which counts experts.

    Raises:
        ValueError: nothing says how many experts a token is sent to.
    """
    experts = [p for n, p in layer.named_parameters() if "experts" in n.split(".") and p.ndim == 3]
    biases = [p for n, p in layer.named_parameters() if "experts" in n.split(".") and p.ndim == 2]
    if not experts:
        return 0.0
    if not config.get("num_experts_per_tok"):
        raise ValueError(
            f"an LLM of {len(experts[0])} experts whose config has no num_experts_per_tok: its model FLOPs are not "
            "known. Say ~callbacks.throughput."
        )
    idle = sum(_times(p, flows) * (1 - config["num_experts_per_tok"] / len(p)) for p in experts)
    return idle + sum(_times(p, flows) for p in biases)


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _times(weight: Tensor, flows: bool) -> float:
    """FLOPs of one token through ``weight``, forward and backward."""
    return 2 * weight.numel() * (1 + weight.requires_grad + flows)
