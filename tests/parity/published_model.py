"""A small published model of any size, and a folder with what it computes, in the layout of `tests/golden/README.md`.

It stands on transformers' CLIP and Llama and on nothing of this project: no configuration of ours is read, no key
renamed, no index table built. Tokens are dealt with the index arithmetic of method A.3, grids are known beforehand.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

IMAGE = -200
Grid = tuple[int, int]  # columns, rows


@dataclass(kw_only=True)
class Row:
    """One sample: ids with at most one placeholder, and an image that is exactly as large as its grid."""

    ids: list[int]
    answer: int  # as many ids at the end are supervised
    grid: Grid | None = None


@dataclass(kw_only=True)
class Published:
    """A published configuration, its tower's, and rows to run; `write` fills a folder."""

    name: str
    tower: dict
    host: dict
    plan: dict
    rows: list[Row]
    tower_name: str = "vision_tower"
    max_length: int = 512
    kept_layers: tuple[int, ...] = (0, 2, 3)  # whose inputs are stored
    gradients: tuple[str, ...] = ()  # published keys
    greedy: int = 0  # ids
    mean: list[float] = field(default_factory=lambda: [0.4, 0.5, 0.6])
    std: list[float] = field(default_factory=lambda: [0.2, 0.3, 0.25])

    def __post_init__(self) -> None:
        torch.manual_seed(7)
        self.clip = CLIPVisionModel(CLIPVisionConfig(**self.tower, attn_implementation="eager"))
        width, out = self.tower["hidden_size"], self.host["hidden_size"]
        self.projector: nn.Module = nn.Linear(width, out)
        if self.plan["mm_projector_type"] == "mlp2x_gelu":
            self.projector = nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))
        self.llm = LlamaForCausalLM(LlamaConfig(**self.host, attn_implementation="eager")).eval()
        last = self.tower["num_hidden_layers"]
        appended = 5 if self.start == last else 0  # method B.5
        self.post = nn.ModuleList([CLIPEncoderLayer(self.clip.config) for _ in range(appended)])
        for module in (self.clip, self.projector, self.llm, self.post):
            for name, parameter in module.named_parameters():
                noise = torch.randn_like(parameter)
                is_norm = "norm" in name and name.endswith("weight")
                parameter.data = 1 + 0.1 * noise if is_norm else noise / parameter.shape[-1] ** 0.5
        self.newline = nn.Parameter(torch.randn(out) / 2)
        rng = np.random.default_rng(3)
        side = self.tower["image_size"]
        self.images = [
            Image.fromarray(rng.integers(0, 255, (row.grid[1] * side, row.grid[0] * side, 3), dtype=np.uint8))
            if row.grid
            else None
            for row in self.rows
        ]

    @property
    def hd(self) -> bool:
        return self.plan.get("is_anyres_deepstack", False)

    @property
    def start(self) -> int | None:
        """The layer of the tower before which DeepStack-V begins."""
        words = self.plan["deepstack_args_for_ablation"].split("+")
        starts = [int(word.rsplit("_", 1)[1]) for word in words if word.startswith("lsvit_start_layer_")]
        return starts[0] if starts else None

    def weights(self) -> dict[str, nn.Parameter]:
        """Every parameter under its published key; a tied one once, as transformers writes it."""
        stem = "model.vision_tower.vision_tower.vision_model."
        named = {f"{stem}{name}": p for name, p in self.clip.named_parameters()}
        named |= {f"model.mm_projector.{name}": p for name, p in self.projector.named_parameters()}
        named |= dict(self.llm.named_parameters())
        named |= {f"model.vision_tower.post_encoder.{name}": p for name, p in self.post.named_parameters()}
        return named | ({"model.image_newline": self.newline} if self.hd else {})

    # From an image to views

    def cut(self, image: Image.Image, columns: int, rows: int) -> list[Tensor]:
        side = self.tower["image_size"]
        large = image.resize((columns * side, rows * side), Image.Resampling.BICUBIC)
        cells = []
        for y in range(rows):
            for x in range(columns):
                cell = np.array(large.crop((x * side, y * side, (x + 1) * side, (y + 1) * side)))
                pixels = (torch.from_numpy(cell).float() / 255 - torch.tensor(self.mean)) / torch.tensor(self.std)
                cells.append(pixels.permute(2, 0, 1))
        return cells

    def views(self, image: Image.Image, grid: Grid) -> Tensor:
        """Global view, tiles; in HD the enlarged global view's, then each enlarged tile's (method A.7)."""
        (columns, rows), u = grid, int(self.plan["num_crops"] ** 0.5)
        views = self.cut(image, 1, 1) + self.cut(image, columns, rows)
        if self.hd:
            views += self.cut(image, u, u)
            fine = self.cut(image, columns * u, rows * u)
            for cell in range(columns * rows):
                top, left = cell // columns * u, cell % columns * u
                views += [fine[(top + i) * columns * u + left + j] for i in range(u) for j in range(u)]
        return torch.stack(views)

    # From views to what the language model sees

    def encode(self, views: Tensor) -> list[Tensor]:
        """Projected tokens [p * p, d] of each view."""
        states = self.clip(views, output_hidden_states=True).hidden_states[self.plan["mm_vision_select_layer"]]
        return list(self.projector(states[:, 1:]))

    def encode_stacked(self, views: Tensor, grid: Grid, start: int) -> Tensor:
        """DeepStack-V (method B): the global view's tokens, the tiles' added on the way; states before each layer."""
        state, groups, states = self.clip.pre_layrnorm(self.clip.embeddings(views)), [], []
        for number, layer in enumerate([*self.clip.encoder.layers, *self.post]):
            if number == start:
                groups, state = self.deal(list(state[1:, 1:]), grid), state[:1]
            if 0 <= number - start < len(groups):
                state = state + F.pad(groups[number - start], (0, 0, 1, 0))
            states.append(state)
            state = layer(state, None)
        states.append(state)
        selected = states[-1 if self.post else self.plan["mm_vision_select_layer"]]
        return self.projector(selected[0, 1:])

    def deal(self, tiles: list[Tensor], grid: Grid) -> list[Tensor]:
        """Groups by the index arithmetic of method A.3."""
        columns, rows = grid
        p = self.tower["image_size"] // self.tower["patch_size"]

        def token(y: int, x: int) -> Tensor:
            return tiles[y // p * columns + x // p][y % p * p + x % p]

        places = [
            [(r * rows + i, c * columns + j) for r in range(p) for c in range(p)]
            for i in range(rows)
            for j in range(columns)
        ]
        if self.plan.get("deepstack_sampling") == "1d":
            flat = [(y, x) for y in range(rows * p) for x in range(columns * p)]
            places = [flat[k :: rows * columns] for k in range(rows * columns)]
        return [torch.stack([token(y, x) for y, x in group]) for group in places]

    def lay(self, views: list[Tensor], grid: Grid) -> Tensor:
        """HD: the first view's tokens, then the others' mosaic with a newline after every row."""
        columns, rows = grid
        p = self.tower["image_size"] // self.tower["patch_size"]
        parts = [views[0]]
        for y in range(rows * p):
            for x in range(columns):
                parts.append(views[1 + y // p * columns + x][y % p * p : (y % p + 1) * p])
            parts.append(self.newline[None])
        return torch.cat(parts)

    def image_tokens(self, image: Image.Image, grid: Grid) -> tuple[Tensor, list[Tensor]]:
        """What an image puts into the sequence, and its groups over the same positions."""
        if self.start is not None:
            return self.encode_stacked(self.views(image, grid), grid, self.start), []
        tokens, count = self.encode(self.views(image, grid)), grid[0] * grid[1]
        if not self.hd:
            return tokens[0], self.deal(tokens[1:], grid)
        u = int(self.plan["num_crops"] ** 0.5)
        fine = tokens[1 + count :]
        dealt = [self.deal(fine[view * u * u : (view + 1) * u * u], (u, u)) for view in range(1 + count)]
        groups = [self.lay([of_view[k] for of_view in dealt], grid) for k in range(u * u)]
        return self.lay(tokens[: 1 + count], grid), groups

    # Through the language model

    def forward(self, row: Row, image: Image.Image | None, new: list[int]) -> tuple[list[Tensor], Tensor, list[int]]:
        """Every layer's input [t, d], logits [t, v], and labels [t] of one row, with ``new`` ids behind it."""
        embed, parts, labels, start, groups = self.llm.model.embed_tokens, [], [], 0, []
        for place, token in enumerate(row.ids):
            supervised = place >= len(row.ids) - row.answer
            if token == IMAGE:
                assert image is not None
                assert row.grid is not None
                start = len(labels)
                tokens, groups = self.image_tokens(image, row.grid)
                parts.append(tokens)
                labels += [-100] * len(tokens)
            else:
                parts.append(embed(torch.tensor([token])))
                labels.append(token if supervised else -100)
        hidden = torch.cat(parts)[: self.max_length]
        labels, prompt = labels[: self.max_length], len(hidden)
        hidden = torch.cat([hidden, embed(torch.tensor(new, dtype=torch.long))])[None]
        length = hidden.shape[1]
        positions = torch.arange(length)[None]
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        rotary = self.llm.model.rotary_emb(hidden, positions)
        at = {self.plan["deepstack_start_id"] + k * self.plan["deepstack_interval"]: g for k, g in enumerate(groups)}
        inputs = []
        for number, layer in enumerate(self.llm.model.layers):
            if number in at:
                added = at[number][: prompt - start]
                hidden = hidden + F.pad(added, (0, 0, start, length - start - len(added)))
            inputs.append(hidden[0])
            hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        return inputs, self.llm.lm_head(self.llm.model.norm(hidden))[0], labels

    def answer(self, row: Row, image: Image.Image | None) -> list[int]:
        new: list[int] = []
        with torch.no_grad():
            for _ in range(self.greedy):
                new.append(int(self.forward(row, image, new)[1][-1].argmax()))
        return new

    # The folder

    def write(self, folder: Path) -> None:
        """Weights, tower and case, with everything that this model computes."""
        home = folder / "cases" / self.name
        for place in (home, folder / "checkpoints" / self.name, folder / self.tower_name):
            place.mkdir(parents=True, exist_ok=True)
        side = self.tower["image_size"]
        pixels = {"image_mean": self.mean, "image_std": self.std, "size": side, "crop_size": side, "resample": 3}
        _dump(folder / self.tower_name / "config.json", {**self.tower, "model_type": "clip_vision_model"})
        _dump(folder / self.tower_name / "preprocessor_config.json", pixels)
        save_file(
            {k: p.detach().clone() for k, p in self.weights().items()},
            folder / "checkpoints" / self.name / "model.safetensors",
        )
        config = {
            "model_type": "deepstack_llama",
            "mm_vision_tower": self.tower_name,
            "image_aspect_ratio": "deepstack",
        }
        _dump(home / "config.json", {**self.host, **self.plan, **config, "tokenizer_model_max_length": self.max_length})
        meta = {
            "checkpoint": f"checkpoints/{self.name}",
            "grids": [row.grid or (1, 1) for row in self.rows],
            "images": [f"image_{i}.png" if image else None for i, image in enumerate(self.images)],
        }
        if self.greedy:
            meta["greedy"] = [self.answer(row, image) for row, image in zip(self.rows, self.images, strict=True)]
        _dump(home / "meta.json", meta)
        for number, image in enumerate(self.images):
            if image:
                image.save(home / f"image_{number}.png")
        save_file(self._inputs(), home / "inputs.safetensors")
        save_file(self._outputs(), home / "outputs.safetensors")

    def _inputs(self) -> dict[str, Tensor]:
        rows = [torch.tensor(row.ids) for row in self.rows]
        labels = [torch.tensor([-100] * (len(r.ids) - r.answer) + r.ids[len(r.ids) - r.answer :]) for r in self.rows]
        tensors = {
            "input_ids": pad_sequence(rows, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            "attention_mask": pad_sequence([torch.ones(len(r), dtype=torch.uint8) for r in rows], batch_first=True),
        }
        for number, (row, image) in enumerate(zip(self.rows, self.images, strict=True)):
            side = self.tower["image_size"]
            views = self.views(image, row.grid) if image and row.grid else torch.zeros(2, 3, side, side)
            tensors[f"views.{number}"] = views.contiguous()
        return tensors

    def _outputs(self) -> dict[str, Tensor]:
        seen = [self.forward(row, image, []) for row, image in zip(self.rows, self.images, strict=True)]
        predicted = torch.cat([logits[:-1] for _, logits, _ in seen])
        loss = F.cross_entropy(predicted, torch.tensor([label for *_, labels in seen for label in labels[1:]]))
        named = self.weights()
        grads = torch.autograd.grad(loss, [named[key] for key in self.gradients]) if self.gradients else ()
        tensors = {f"grad.{key}": grad for key, grad in zip(self.gradients, grads, strict=True)}
        tensors |= {
            f"layer_input.{n}": pad_sequence([s[0][n] for s in seen], batch_first=True) for n in self.kept_layers
        }
        tensors |= {"logits": pad_sequence([s[1] for s in seen], batch_first=True), "loss": loss.reshape(1)}
        return {key: tensor.detach().contiguous() for key, tensor in tensors.items()}


def _dump(file: Path, values: dict) -> None:
    file.write_text(json.dumps(values))
