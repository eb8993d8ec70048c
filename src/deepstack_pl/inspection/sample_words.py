"""What terminal and page say alike of a record: safe text, signs and colours of groups, and lines of numbers."""

import unicodedata
from dataclasses import dataclass

from deepstack_pl.inspection.anatomy import Anatomy, Board, Group
from deepstack_pl.stacking.config import Dealt, Source

NOT_AT_HAND = "not at hand: this source hands out decoded records alone"
_SYMBOLS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Stored:
    """What lies on disk: the record's text, and a line for each image (type and bytes), as far as that is known."""

    json: str | None = None
    images: tuple[str, ...] = ()

    def image(self, number: int) -> str:
        """The line of one image; empty where nothing is known."""
        return self.images[number] if number < len(self.images) else ""


def safe(text: str, *, lines: bool = False) -> str:
    """``text`` with nothing in it that acts on a terminal or turns the order of what follows.

    What is invisible, half a character or unassigned is named by its number: ESC is <U+001B>. ``lines`` keeps line
    ends, and writes tabs as four spaces.
    """
    keeps = {"\n": "\n", "\t": "    "} if lines else {}
    return "".join(keeps.get(sign) or _visible(sign) for sign in text)


def token_text(text: str) -> str:
    """A token as it is shown: spaces and line ends are signs, too."""
    shown = "".join({" ": "␣", "\n": "↵"}.get(sign) or _visible(sign) for sign in text)
    return f"◌{shown}" if text and unicodedata.category(text[0]).startswith("M") else shown


def _visible(sign: str) -> str:
    acts = unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    return f"<U+{ord(sign):04X}>" if acts else sign


def symbol(dealt: Dealt) -> str:
    """The sign that stands for a group on a board."""
    source, group = dealt
    return "g" if source is Source.global_view else _SYMBOLS[group] if group < len(_SYMBOLS) else "+"


def counts_of(anatomy: Anatomy) -> list[tuple[str, str]]:
    """What there is of everything, a name and a value each."""
    a = anatomy
    return [
        ("positions", f"{a.positions:,}"),
        ("share of context", f"{a.share:.1%} of llm.max_length={a.max_length:,}"),
        ("visual positions", f"{a.visual:,}"),
        ("text positions", f"{a.positions - a.visual:,}"),
        ("learned tokens", f"{a.learned:,}"),
        ("cut off", lost(a) if a.cut else "nothing"),
    ]


def lost(anatomy: Anatomy) -> str:
    """What is cut off, counted."""
    return f"{anatomy.cut:,} positions, {anatomy.cut_learned:,} of them answers"


def group_line(group: Group) -> str:
    """What a group adds, and where."""
    if not group.tokens + group.newlines:
        return f"{group.name}: this image does not fill it, nothing is added ({', '.join(group.places)})"
    newlines = f" and {group.newlines:,} newlines" if group.newlines else ""
    return f"{group.name} -> {', '.join(group.places)}: {group.tokens:,} tokens{newlines}"


def picture_line(anatomy: Anatomy, number: int) -> str:
    """What an image takes in the text, and what is cut of it."""
    picture = anatomy.pictures[number]
    parts = " + ".join(f"{count:,} {name}" for name, count in picture.in_text)
    cut = anatomy.cut_of(number)
    off = f"; CUT OFF: {'all' if cut == picture.positions else f'{cut:,}'} of them" if cut else ""
    return f"{picture.size[0]} x {picture.size[1]} pixels, {picture.positions:,} positions in the text ({parts}){off}"


def board_line(board: Board) -> str:
    """A board's size."""
    height, width = board.pixels.shape[:2]
    columns, rows = board.grid
    views = f"{columns} x {rows} views of {width // columns} x {height // rows}" if columns * rows > 1 else "one view"
    return f"{board.name}: {views}, {width} x {height} pixels"
