"""DeepStackForConditionalGeneration: tower, projector and LLM under one plan, as a Hugging Face model.

Meng et al., 2024, https://arxiv.org/abs/2406.04334. Axes: ``b t`` positions, ``v`` views, ``n`` slots, ``g`` groups
entering the LLM, ``h`` groups entering the tower, ``m`` patches of all global views, ``d`` LLM width.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, Cache
from transformers import PreTrainedModel as HFModel

from deepstack_pl.language.config import Loss
from deepstack_pl.language.host import CARRIER, Carrier, assert_installed, decoder_layers, install
from deepstack_pl.language.loss import token_losses
from deepstack_pl.language.varlen import segment_arguments
from deepstack_pl.multimodal.config import (
    LoRAConfig,
    ProjectorKind,
    Sharing,
    check_lora,
    check_pooling,
    check_projector,
)
from deepstack_pl.multimodal.configuration import DeepStackConfig
from deepstack_pl.multimodal.generation import DeepStackGenerationMixin
from deepstack_pl.multimodal.groups import text_and_groups
from deepstack_pl.multimodal.lora import add_adapters
from deepstack_pl.multimodal.merge import merge
from deepstack_pl.multimodal.output import CACHE, DeepStackOutput
from deepstack_pl.multimodal.projector import build_own_projectors, build_projector
from deepstack_pl.multimodal.tensor_files import refuse_pickles_alone
from deepstack_pl.stacking.config import Host, Newline, Sequence
from deepstack_pl.stacking.injection import Traces
from deepstack_pl.vision.encoder import VisionEncoder


class DeepStackForConditionalGeneration(HFModel, DeepStackGenerationMixin):
    """A vision tower, a projector and a stock causal LM; injections as ``plan`` says.

    Parts initialise themselves, each from its own seed, so that shared parts are equal in every arm of a sweep.
    """

    config_class = DeepStackConfig
    config: DeepStackConfig
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012 - Hugging Face reads it on the class
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: DeepStackConfig) -> None:
        super().__init__(config)
        self.plan = config.typed_plan()
        self.loss = Loss.chunked  # in training; weights and answers know nothing of it
        vision = config.typed_vision()
        with _seeded(config.init_seed, "vision"):
            self.vision_tower = VisionEncoder(vision, self.plan)
        with _seeded(config.init_seed, "projector"):
            width = config.text_config.hidden_size
            sharing, inputs = Sharing(config.projector_sharing), vision.width
            if self.plan.sequence is Sequence.channels:
                inputs *= 1 + self.plan.most_tiles
            kind = ProjectorKind(config.projector)
            check_pooling(self.plan, vision)
            check_projector(self.plan, kind, sharing)
            self.projector = build_projector(self.plan, kind, sharing, inputs, width)
            self.own_projectors = build_own_projectors(self.plan, kind, sharing, inputs, width)
        with _seeded(config.init_seed, "llm"):
            self.language_model = AutoModelForCausalLM.from_config(
                config.text_config, attn_implementation=config._attn_implementation
            )
        gated = {host.value: len(self.plan.gated(host)) for host in Host}
        self.gates = nn.ParameterDict({host: nn.Parameter(torch.zeros(n)) for host, n in gated.items() if n})
        self.image_newline: nn.Parameter | None = None
        if self.plan.newline is not Newline.none:
            with _seeded(config.init_seed, "newline"):
                self.image_newline = nn.Parameter(torch.randn(width) / width**0.5)  # as LLaVA draws it
        install(self.language_model, self.plan)
        self.adapt(config.typed_lora())
        self.post_init()
        # device_map: a decoder layer and the tower run on one device each; the tower's parts are called one by one.
        self._no_split_modules = {*(self._no_split_modules or ()), VisionEncoder.__name__}
        self._no_split_modules |= {type(layer).__name__ for layer in decoder_layers(self.language_model)}
        self.freeze_unreachable()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: each part drew its weights at construction, from its own seed."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "DeepStackForConditionalGeneration":
        """As every module's, but that rotary frequencies stay in float32, as loading leaves them: in bfloat16 the angle
        of position 2,000 would be off by a radian.
        """
        kept = {name: buffer for name, buffer in self.named_buffers() if name.endswith("inv_freq")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            owner, _, own = name.rpartition(".")
            module = self.get_submodule(owner)
            after = module.get_buffer(own)
            if after.dtype is not before.dtype:
                setattr(module, own, before.to(after.device))
        return self

    def adapt(self, lora: Mapping[str, LoRAConfig]) -> None:
        """Put low-rank adapters into the named parts, for good; `merge_adapters` takes them out.

        Raises:
            ValueError: there can be no such adapters.
        """
        check_lora(lora)
        tower = self.vision_tower.tower
        hosts: dict[str, tuple[nn.Module, list[nn.Module]]] = {
            "vision": (tower, list(tower.blocks)[: self.plan.vit_layers]),  # later ones reach no feature
            "llm": (self.language_model, list(decoder_layers(self.language_model))),
        }
        for part, values in lora.items():
            with _seeded(self.config.init_seed, f"{part} adapters"):
                add_adapters(part, *hosts[part], values)
        self.config.lora = {part: asdict(values) for part, values in lora.items()}

    def blocks(self) -> list[nn.Module]:
        """What repeats, in the order in which it runs: the tower's blocks, then the LLM's layers."""
        return [*self.vision_tower.tower.blocks, *decoder_layers(self.language_model)]

    def unreachable(self) -> list[str]:
        """Parameters that the plan cannot reach; they are frozen at build."""
        return [f"vision_tower.tower.{name}" for name in self.vision_tower.tower.unreachable()]

    def freeze_unreachable(self) -> None:
        """Parameters that cannot get a gradient say so."""
        for name in self.unreachable():
            self.get_parameter(name).requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "b t"] | None = None,
        views: UInt8[Tensor, "v 3 s s"] | Float[Tensor, "v 3 s s"] | None = None,
        token_index: Int[Tensor, "b t"] | None = None,
        sequence_rows: Int[Tensor, " n"] | None = None,
        group_rows: Int[Tensor, "g n"] | None = None,
        vit_rows: Int[Tensor, "h m"] | None = None,
        encoded: tuple[Float[Tensor, "n d"], Float[Tensor, "_ n d"]] | None = None,
        labels: Int[Tensor, "b t"] | None = None,
        boundaries: Int[Tensor, " ends"] | None = None,
        longest: int | None = None,
        learned_at: Int[Tensor, " l"] | None = None,
        targets: Int[Tensor, " l"] | None = None,
        use_cache: bool | None = None,
        record: bool = False,
        **kwargs: Any,
    ) -> DeepStackOutput:
        """One pass; the visual arguments come together, from a `batch.MultimodalBatch`, or not at all, and so do those
        of training (``boundaries`` to ``targets``), which gives losses in the place of logits.

        Float ``views`` are taken as normalised already; the processor's are uint8. ``encoded`` stands for all of them
        but ``token_index``: what `encode` made of them, once for all of ``generate``.

        Raises:
            ValueError: some of the arguments that come together are missing or of different shapes, a cache would let
                segments see each other, or placeholders stand without an image.
        """
        traces = Traces() if record else None
        visual = (views, token_index, sequence_rows, group_rows, vit_rows)
        if encoded is None and any(v is not None for v in visual):
            if views is None or token_index is None or sequence_rows is None or group_rows is None or vit_rows is None:
                raise ValueError("views, token_index, sequence_rows, group_rows and vit_rows come together: pass all.")
            encoded = self.encode(views, vit_rows, sequence_rows, group_rows, traces)
        if encoded is None:
            cache: Cache | None = kwargs.get(CACHE)
            if cache is None or not cache.get_seq_length():
                self._refuse_placeholders(input_ids)
            embeds = self.get_input_embeddings()(input_ids)
        else:
            assert token_index is not None, "generate hands on both"
            if token_index.shape != input_ids.shape:  # (1, t) or (b, 1) would spread over every row or position
                raise ValueError(
                    f"token_index is {[*token_index.shape]}, input_ids {[*input_ids.shape]}: it says for each position "
                    "which slot stands there. Take both from one batch, and cut or repeat them alike."
                )
            sequence, groups = encoded
            embeds = merge(self.get_input_embeddings(), input_ids, sequence, token_index)
            if self.plan.at(Host.llm):
                kwargs[CARRIER] = Carrier(
                    features=groups,
                    index=token_index,
                    scales=self._scales(Host.llm),
                    traces=traces,
                )
        inputs = {"inputs_embeds": embeds, "position_ids": position_ids, "use_cache": use_cache, **kwargs}
        if boundaries is not None or learned_at is not None:
            if boundaries is None or longest is None or learned_at is None or targets is None:
                raise ValueError("boundaries, longest, learned_at and targets come together: pass all.")
            if use_cache is not False:
                raise ValueError(f"use_cache={use_cache}: with a cache, segments of a row see each other. Say False.")
            inputs |= segment_arguments(self.language_model, attention_mask, boundaries, longest)
            losses = token_losses(self.language_model, inputs, learned_at, targets, self.loss)
            return DeepStackOutput(losses=losses, record=None if traces is None else traces.data)
        output = self.language_model(attention_mask=attention_mask, labels=labels, **inputs)
        return DeepStackOutput(
            loss=output.loss,
            logits=output.logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            record=None if traces is None else traces.data,
            **{CACHE: getattr(output, CACHE)},
        )

    def encode(
        self,
        views: UInt8[Tensor, "v 3 s s"] | Float[Tensor, "v 3 s s"],
        vit_rows: Int[Tensor, "h m"],
        sequence_rows: Int[Tensor, " n"],
        group_rows: Int[Tensor, "g n"],
        traces: Traces | None = None,
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "_ n d"]]:
        """The visual tokens of the text, and of each group that enters the LLM: one tower call a step."""
        features = self.vision_tower(views, vit_rows, self._scales(Host.vit), traces)
        return text_and_groups(
            self.plan,
            ProjectorKind(self.config.projector),
            (self.projector, self.own_projectors),
            self.image_newline,
            features,
            vit_rows.shape[1] // features[0].shape[1],
            (sequence_rows, group_rows),
        )

    def _scales(self, host: Host) -> Float[Tensor, " gated"] | None:
        return self.gates[host.value].tanh() if host.value in self.gates else None

    def _refuse_placeholders(self, input_ids: Int[Tensor, "b t"]) -> None:
        if torch.compiler.is_compiling():  # a look at values would break the graph
            return
        if (input_ids == self.config.image_token_id).any():
            raise ValueError(
                "input_ids hold image placeholders, but no views were given. Let the processor make the inputs: "
                "processor(text, images)."
            )

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a run's or an exported folder, strictly, and from safetensors alone.

        Raises:
            ValueError: there are only pickles, or a tensor is missing, left over or of another shape.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        folder = args[0] if args else kwargs["pretrained_model_name_or_path"]
        refuse_pickles_alone(folder)
        options = kwargs | {"output_loading_info": True, "use_safetensors": True}
        model, info = super().from_pretrained(*args, **options)  # pyright: ignore
        wrong = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        if any(wrong.values()):
            raise ValueError(f"{folder} does not hold this model's weights: {wrong}. Is it of another plan or version?")
        assert_installed(model.language_model)
        model.freeze_unreachable()  # loading replaced every parameter
        return (model, info) if wants_info else model


@contextmanager
def _seeded(seed: int, part: str) -> Iterator[None]:
    """Draw ``part``'s initial weights from its own seed, and leave the caller's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{seed}/{part}".encode()))
        yield


AutoConfig.register(DeepStackConfig.model_type, DeepStackConfig, exist_ok=True)
AutoModelForImageTextToText.register(DeepStackConfig, DeepStackForConditionalGeneration, exist_ok=True)
