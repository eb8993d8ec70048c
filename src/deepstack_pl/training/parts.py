"""Which parts learn: freezing as a stage says, and the table that proves it. Works on meta tensors."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from torch import nn

from deepstack_pl.multimodal.build import PARTS, parts
from deepstack_pl.multimodal.config import LoRAConfig, check_lora
from deepstack_pl.multimodal.lora import is_adapter
from deepstack_pl.multimodal.model import DeepStackForConditionalGeneration
from deepstack_pl.training.config import PartConfig, StageConfig


@dataclass(frozen=True, slots=True)
class PartRow:
    """One part of the model, in numbers of parameters.

    Attributes:
        unreachable: of the frozen ones, those that the plan cannot reach (blocks after the tapped layer, ...).
        unreachable_names: what these are: the shortest prefixes that hold nothing else.
        lr: peak learning rate; None where nothing of the part is trained.
        adapters: how the part's adapters are, where it holds some; they are all that is trained of it.
    """

    part: str
    parameters: int
    trained: int
    frozen: int
    unreachable: int
    unreachable_names: tuple[str, ...]
    lr: float | None
    adapters: str | None = None


@dataclass(frozen=True, slots=True)
class PartsTable:
    """The trainable-parts table of a run: as data, for a terminal, as markdown."""

    stage: str
    rows: tuple[PartRow, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "parts": [{**asdict(r), "unreachable_names": [*r.unreachable_names]} for r in self.rows],
        }

    @property
    def trained(self) -> int:
        return sum(row.trained for row in self.rows)

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    def table(self) -> Table:
        """For a terminal."""
        table = Table(title=f"what learns (stage {self.stage})")
        for name in _COLUMNS:
            table.add_column(name, justify="left" if name == "part" else "right")
        for cells in self._cells():
            table.add_row(*cells)
        table.caption = "\n".join(self._notes()) or None
        return table

    def markdown(self) -> str:
        """For TensorBoard and reports."""
        head = [f"| {' | '.join(_COLUMNS)} |", f"|---|{'---:|' * (len(_COLUMNS) - 1)}"]
        lines = head + [f"| {' | '.join(cells)} |" for cells in self._cells()]
        return "\n".join(lines + [part for note in self._notes() for part in ("", note)])

    def _cells(self) -> list[list[str]]:
        counts = [
            [r.part, *(f"{n:,}" for n in (r.parameters, r.trained, r.frozen, r.unreachable)), _rate(r)]
            for r in self.rows
        ]
        totals = [
            sum(getattr(r, name) for r in self.rows) for name in ("parameters", "trained", "frozen", "unreachable")
        ]
        return [*counts, ["all", *(f"{n:,}" for n in totals), ""]]

    def _notes(self) -> list[str]:
        listed = ", ".join(name for row in self.rows for name in row.unreachable_names)
        notes = [f"unreachable under this plan, frozen: {listed}"] if listed else []
        return notes + [f"{row.part}: adapters, {row.adapters}" for row in self.rows if row.adapters]


_COLUMNS = ("part", "parameters", "trained", "frozen", "of these unreachable", "peak lr")


def apply_stage(model: DeepStackForConditionalGeneration, stage: StageConfig) -> PartsTable:
    """Freeze and thaw ``model`` as ``stage`` says; what the plan cannot reach stays frozen.

    Raises:
        ValueError: nothing would be trained, or a part is to be trained at no learning rate.
    """
    wanted = part_configs(stage)
    if not any(config.trained for config in wanted.values()):
        raise ValueError(
            f"stage={stage.name} trains nothing: {', '.join(f'stage.{part}.trained' for part in PARTS)} are all false. "
            "Set at least one to true."
        )
    for part, config in wanted.items():
        if config.trained and config.lr <= 0:
            raise ValueError(
                f"stage.{part}.lr={config.lr}, but stage.{part}.trained=true: a trained part needs a rate above "
                f"zero. Raise it, or set stage.{part}.trained=false."
            )
    assert model.config.typed_lora() == adapters_of(stage), "the model was built with other adapters than the stage's"
    out_of_reach = set(model.unreachable())
    for part, named in parts(model).items():
        adapted = part in model.config.lora
        for name, parameter in named:
            learns = is_adapter(name) if adapted else name not in out_of_reach
            parameter.requires_grad_(wanted[part].trained and learns)
    return parts_table(model, stage)


def parts_table(model: DeepStackForConditionalGeneration, stage: StageConfig) -> PartsTable:
    """The table of ``model`` as it stands now."""
    out_of_reach, wanted, rows = set(model.unreachable()), part_configs(stage), []
    lora = model.config.typed_lora()
    for part, named in parts(model).items():
        names = [name for name, _ in named]
        trained = sum(p.numel() for _, p in named if p.requires_grad)
        total = sum(p.numel() for _, p in named)
        rows.append(
            PartRow(
                part=part,
                parameters=total,
                trained=trained,
                frozen=total - trained,
                unreachable=sum(p.numel() for n, p in named if n in out_of_reach),
                unreachable_names=tuple(shortest_prefixes(names, out_of_reach)),
                lr=wanted[part].lr if trained else None,
                adapters=_described(lora[part]) if part in lora else None,
            )
        )
    return PartsTable(stage.name, tuple(rows))


def part_configs(stage: StageConfig) -> dict[str, PartConfig]:
    """The stage's values by the part's name."""
    return {"vision": stage.vision, "projector": stage.projector, "llm": stage.llm}


def adapters_of(stage: StageConfig) -> dict[str, LoRAConfig]:
    """The adapters that ``stage`` wants, by the part's name.

    Raises:
        ValueError: there can be none such, or they would not be trained.
    """
    wanted = {part: config for part, config in part_configs(stage).items() if config.lora.rank != 0}
    for part, config in wanted.items():
        if not config.trained:
            raise ValueError(
                f"stage.{part}.lora.rank={config.lora.rank}, but stage.{part}.trained=false: adapters that do not "
                f"learn add nothing. Say stage.{part}.trained=true, or stage.{part}.lora.rank=0."
            )
    lora = {part: config.lora for part, config in wanted.items()}
    check_lora(lora)
    return lora


def optimizer_groups(
    model: DeepStackForConditionalGeneration, stage: StageConfig, weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW's groups: by part, and within it with weight decay (matrices) and without (biases, norms, gates)."""
    groups = []
    for part, named in parts(model).items():
        trained = [p for _, p in named if p.requires_grad]
        for decay, members in (
            (weight_decay, [p for p in trained if _decays(p)]),
            (0.0, [p for p in trained if not _decays(p)]),
        ):
            if members:
                lr = part_configs(stage)[part].lr
                groups.append({"params": members, "lr": lr, "weight_decay": decay, "part": part})
    return groups


def shortest_prefixes(names: list[str], chosen: set[str]) -> list[str]:
    """The fewest dotted prefixes that cover exactly the ``chosen`` among ``names``."""
    others = [name for name in names if name not in chosen]
    found: list[str] = []
    for name in names:
        if name not in chosen or any(name == p or name.startswith(f"{p}.") for p in found):
            continue
        words = name.split(".")
        prefixes = [".".join(words[:length]) for length in range(1, len(words) + 1)]
        found.append(next(p for p in prefixes if not any(o == p or o.startswith(f"{p}.") for o in others)))
    return found


def _decays(parameter: nn.Parameter) -> bool:
    """Biases, norms, class embeddings and gates have fewer than two dimensions."""
    return parameter.ndim >= 2


def _described(lora: LoRAConfig) -> str:
    where = ", ".join(lora.targets) or "every linear layer of the blocks"
    return f"rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}: {where}"


def _rate(row: PartRow) -> str:
    return "frozen" if row.lr is None else f"{row.lr:g}"
