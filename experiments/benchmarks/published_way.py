"""Training as the published code goes about it, against ours: the same weights, the same samples.

The published way, written anew for this comparison after DeepStack-VL's and LLaVA's code: every view through Hugging
Face's CLIP image processor by itself, in float32; ids, labels and features spliced sample by sample in Python; groups
cut out of each image's mosaic and added to each sample's rows before each layer in a loop; rows padded on the right;
logits of all positions in float32, and a loss over all of them. Ours: `data.batching=packed llm.attention=varlen` and
the defaults. Before anything is timed, both must give one loss and one set of gradients on a batch.

Samples are like LLaVA-665K's, four times smaller in every length: an image is 144 positions (of 576), a conversation
about an image 48 tokens of text on average (of 190), a fifth are text alone of 225 (of 900), the context is 512 (of
2,048); log-normal, drawn by seed. Made up, since no count of the published files was at hand. Grouped by length is the
best that grouping can do: sorted over all samples, every batch full and of one kind (LLaVA sorts within each global
batch alone). From decoded images to gradients; one thread, CPU time, epochs in turns. Memory: the most that an epoch
adds, in a process of its own.

    python experiments/benchmarks/published_way.py
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import arguments, in_turns, markdown, peak_during, peak_of, ratio, report
from PIL import Image
from sizes import STACKED, batch_of, learn, llm_of, model_of, picture, vision_of
from torch import Tensor
from transformers.masking_utils import create_causal_mask
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from deepstack_pl.data.packing import packs
from deepstack_pl.language.config import Attention
from deepstack_pl.multimodal.expand import make_sample
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration

CAPACITY, BATCH = 512, 12
SAMPLES = 10 * BATCH  # a fifth is text alone: 8 batches with images, 2 without, and no rest
TARGETS = {"time": 1.4, "memory": 0.5}
WAYS = ("published, random", "published, grouped by length", "ours, packed")
IGNORE = -100


@dataclass(frozen=True, slots=True)
class Raw:
    """A sample before anybody has made anything of it; the image stands first."""

    key: str
    ids: list[int]
    labels: list[int]
    image: Image.Image | None


def corpus(model: DeepStackForConditionalGeneration, count: int) -> list[Raw]:
    rng = np.random.default_rng(0)
    pixels = 2 * model.config.typed_vision().image_size
    found = []
    for number in range(count):
        alone = number % 5 == 4
        mean, room = (225, CAPACITY) if alone else (48, CAPACITY - 144)
        text = int(np.clip(rng.lognormal(np.log(mean) - 0.32, 0.8), 8, room))
        words = rng.integers(3, model.config.text_config.vocab_size, text).tolist()
        ids = words if alone else [model.config.image_token_id, *words]
        asked = len(ids) - int(0.6 * text)
        image = None if alone else picture(number, pixels, pixels)
        found.append(Raw(f"sample {number}", ids, [IGNORE] * asked + ids[asked:], image))
    return [found[i] for i in rng.permutation(count)]


class Published:
    """One training step, the published way; with the weights of ``model``, whose tokens stand first in a row."""

    def __init__(self, model: DeepStackForConditionalGeneration) -> None:
        self.model = model
        vision = model.config.typed_vision()
        self.size, self.side = vision.image_size, vision.patches_per_side
        size = {"height": self.size, "width": self.size}
        self.processor = CLIPImageProcessorPil(
            size={"shortest_edge": self.size}, crop_size=size, image_mean=vision.mean, image_std=vision.std
        )

    def views(self, image: Image.Image) -> Tensor:
        """The global view and four tiles, each through the processor."""
        large = image.resize((2 * self.size, 2 * self.size))
        views = [image.resize((self.size, self.size))]
        for y in (0, self.size):
            views += [large.crop((x, y, x + self.size, y + self.size)) for x in (0, self.size)]
        return torch.stack([self.processor.preprocess(view, return_tensors="pt")["pixel_values"][0] for view in views])

    def encode(self, samples: list[Raw]) -> list[tuple[Tensor, Tensor] | None]:
        """For each image its global tokens and its groups, cut out of its mosaic. A text alone brings a blank view,
        which is encoded and left.
        """
        blank = torch.zeros(1, 3, self.size, self.size)
        views = [blank if sample.image is None else self.views(sample.image) for sample in samples]
        pixels = torch.cat(views)
        rows = torch.full((0, len(pixels) * self.side**2), -1, dtype=torch.long)
        features = self.model.projector(self.model.vision_tower(pixels, rows)[0])
        found: list[tuple[Tensor, Tensor] | None] = []
        for own in features.split([len(each) for each in views]):
            if len(own) == 1:
                found.append(None)
                continue
            tiles = own[1:].view(2, 2, self.side, self.side, -1)
            mosaic = tiles.permute(0, 2, 1, 3, 4).reshape(2 * self.side, 2 * self.side, -1)
            groups = [mosaic[i::2, j::2].flatten(0, 1) for i in range(2) for j in range(2)]
            found.append((own[0], torch.stack(groups)))
        return found

    def step(self, samples: list[Raw]) -> Tensor:
        """Forward and backward; the sum of the losses."""
        model, llm = self.model, self.model.language_model
        model.zero_grad()
        embeds, labels, stacked = [], [], []
        for sample, encoded in zip(samples, self.encode(samples), strict=True):
            ids, own = torch.tensor(sample.ids), torch.tensor(sample.labels)
            if encoded is None:
                embeds.append(llm.get_input_embeddings()(ids))
                stacked.append(None)
            else:
                tokens, groups = encoded
                embeds.append(torch.cat([tokens, llm.get_input_embeddings()(ids[1:])]))
                own = torch.cat([torch.full((len(tokens),), IGNORE), own[1:]])
                stacked.append(groups)
            labels.append(own)
        longest = max(len(each) for each in embeds)
        padded = [torch.cat([e, e.new_zeros(longest - len(e), e.shape[1])]) for e in embeds]
        hidden = torch.stack(padded)
        targets = torch.stack([F.pad(own, (0, longest - len(own)), value=IGNORE) for own in labels])
        mask = torch.stack([(torch.arange(longest) < len(e)).long() for e in embeds])
        hidden = self.decode(hidden, mask, stacked)
        logits = llm.get_output_embeddings()(hidden).float()
        loss = F.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]),
            targets[:, 1:].reshape(-1),
            ignore_index=IGNORE,
            reduction="sum",
        )
        loss.backward()
        return loss.detach()

    def decode(self, hidden: Tensor, mask: Tensor, stacked: list[Tensor | None]) -> Tensor:
        """The decoder's layers, with a loop over samples before those that a group enters."""
        decoder = self.model.language_model.get_decoder()
        positions = torch.arange(hidden.shape[1])[None]
        causal = create_causal_mask(decoder.config, hidden, mask, None, positions)
        rotary = decoder.rotary_emb(hidden, positions)
        for number, layer in enumerate(decoder.layers):
            if 1 <= number <= 4:
                hidden = hidden.clone()
                for row, groups in enumerate(stacked):
                    if groups is not None:
                        hidden[row, : groups.shape[1]] += groups[number - 1]
            hidden = layer(hidden, attention_mask=causal, position_ids=positions, position_embeddings=rotary)
        return decoder.norm(hidden)

    def epoch(self, batches: list[list[Raw]]) -> None:
        for batch in batches:
            self.step(batch)


def grouped(samples: list[Raw]) -> list[list[Raw]]:
    """LLaVA's ``group_by_modality_length``: images with images, text with text, like lengths together.

    Raises:
        SystemExit: a kind leaves a rest, whose batch would hold short and long and make grouping look slow.
    """
    batches = []
    for alone in (False, True):
        kind = sorted((s for s in samples if (s.image is None) is alone), key=lambda s: -len(s.ids))
        if len(kind) % BATCH:
            raise SystemExit(
                f"{len(kind)} samples {'without' if alone else 'with'} an image leave a rest in batches of {BATCH}. "
                f"Draw a multiple of {5 * BATCH} samples."
            )
        batches += [kind[start : start + BATCH] for start in range(0, len(kind), BATCH)]
    return batches


def ours(model: DeepStackForConditionalGeneration, samples: list[Raw], forwards: int) -> Iterator[Any]:
    """As many micro-batches as the published way makes: packed rows, side by side."""
    vision = model.config.typed_vision()
    lengths = np.array([len(s.ids) + (0 if s.image is None else vision.patches_per_side**2 - 1) for s in samples])
    rows = packs(np.arange(len(samples)), lengths, CAPACITY)
    each = -(-len(rows) // forwards)
    for start in range(0, len(rows), each):
        made = [prepared(model, samples[number]) for row in rows[start : start + each] for number in row]
        yield batch_of(model, [made])


def prepared(model: DeepStackForConditionalGeneration, raw: Raw) -> Any:
    return make_sample(
        raw.key,
        raw.ids,
        raw.labels,
        [] if raw.image is None else [raw.image],
        plan=model.plan,
        vision=model.config.typed_vision(),
        image_token_id=model.config.image_token_id,
        max_length=CAPACITY,
    )


def require_equal(model: DeepStackForConditionalGeneration, samples: list[Raw]) -> str:
    """Both ways on one batch.

    Raises:
        SystemExit: they do not learn the same, and there is nothing to compare.
    """
    theirs = Published(model).step(samples)
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    found = learn(model, batch_of(model, [[prepared(model, sample) for sample in samples]]))
    off = float((found - theirs).abs() / theirs)
    apart = 0.0
    for name, parameter in model.named_parameters():
        if name in expected and parameter.grad is not None:
            scale = expected[name].abs().max().clamp_min(1e-6)
            apart = max(apart, float((parameter.grad - expected[name]).abs().max() / scale))
    if off > 1e-4 or apart > 1e-2:
        raise SystemExit(f"losses are {off:.1e} and gradients {apart:.1e} apart: this would compare two trainings.")
    return (
        f"Both give one loss (within {off:.0e}) and one set of gradients (within {apart:.0e} of each tensor's largest)."
    )


def epochs(model: DeepStackForConditionalGeneration, samples: list[Raw]) -> dict[str, Callable[[], None]]:
    published = Published(model)
    random = [samples[start : start + BATCH] for start in range(0, len(samples), BATCH)]

    def packed() -> None:
        for batch in ours(model, samples, len(random)):
            learn(model, batch)

    ways = (lambda: published.epoch(random), lambda: published.epoch(grouped(samples)), packed)
    return dict(zip(WAYS, ways, strict=True))


def made(*, quick: bool) -> tuple[DeepStackForConditionalGeneration, list[Raw]]:
    width, heads = (64, 2) if quick else (192, 3)
    torch.set_num_threads(1)
    llm = llm_of(width=width, layers=6, heads=heads, vocabulary=4096, attention=Attention.varlen)
    # The tower is small, so that it has the share of a step that CLIP-L has beside a 7B.
    model = model_of(STACKED, llm, vision_of(width=64, layers=3))
    return model, corpus(model, SAMPLES // 2 if quick else SAMPLES)


def main() -> None:
    args = arguments(__doc__, repetitions=3)
    model, samples = made(quick=args.quick)
    equal = require_equal(model, samples[:6])
    work = epochs(model, samples)
    times = in_turns(work, args.repetitions, time.process_time, warm_up=0)  # the batch above has warmed both up
    words = ["--quick"] if args.quick else []
    memory = {way: peak_of(__file__, "peak", way, *words) for way in WAYS}
    learned = sum(label != IGNORE for sample in samples for label in sample.labels)
    rows = []
    for way in WAYS:
        faster = [ratio(times[other], times[way]) for other in WAYS[:2]]
        less = [f"{memory[way] / memory[other]:.2f}" for other in WAYS[:2]]
        speed = f"{learned / statistics.median(times[way]):,.0f}"
        rows.append([way, speed, *faster, f"{memory[way] / 2**20:.0f}", *less])
    head = ["way", "supervised tokens/s", "times as fast as random", "as grouped", "MiB", "of random's", "of grouped's"]
    table = markdown(head, rows)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    about = f"{size:.1f} million parameters, {len(samples)} samples, {learned:,} supervised tokens, batches of {BATCH}."
    targets = f"Targets, of ours against grouped: {TARGETS['time']} times as fast, {TARGETS['memory']} of the memory."
    report(
        "published_way", "Against the published way", [about, equal, table, targets], {"s": times, "B": memory}, args
    )


def peak(way: str, *, quick: bool) -> None:
    work = epochs(*made(quick=quick))[way]
    print(peak_during(work))


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(sys.argv[2], quick="--quick" in sys.argv)
    else:
        main()
