"""A record for a terminal: what was said, how its images are dealt, its tokens with ids and labels."""

from collections.abc import Iterable, Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepstack_pl.inspection.anatomy import Anatomy, Board, Picture, Piece, how_dealt
from deepstack_pl.inspection.plots import colour
from deepstack_pl.inspection.sample_words import (
    NOT_AT_HAND,
    Stored,
    board_line,
    counts_of,
    group_line,
    lost,
    picture_line,
    safe,
    symbol,
    token_text,
)

MOST_PIECES = 400  # tokens on a terminal; the page has them all
MOST_TEXT = 2000  # characters of one text on a terminal
_CORNER = 4  # tokens a side of a view's corner that is drawn
STYLES = {"given": "bright_black", "learned": "bold green underline", "image": "bold blue", "cut": "red strike"}
MARKS = {"given": "·", "learned": "#", "image": "=", "cut": "x"}
_GAP = 2  # columns between tokens
BAR = 80  # signs in the bar of positions


def print_sample(console: Console, anatomy: Anatomy, stored: Stored, title: str) -> None:
    """All of it; ``title`` says which record of what."""
    record = anatomy.record
    _heading(console, safe(record.key))
    line = f"{safe(title)}; source {safe(record.source) or '(none)'}; plan {safe(anatomy.plan.name)}"
    _line(console, f"{line} ({anatomy.plan.digest}); template {safe(anatomy.template)}")
    said = Table.grid(padding=(0, 1))
    for turn in record.turns:
        said.add_row(Text(turn.role.value, style="bold"), Text(shortened(safe(turn.text, lines=True))))
    console.print(said, highlight=False)
    if not anatomy.pictures:
        _line(console, "no image: the sample is text alone")
    for number, picture in enumerate(anatomy.pictures):
        _heading(console, f"image {number}")
        known = stored.image(number)
        _line(console, f"{safe(known)}{', ' if known else ''}{picture_line(anatomy, number)}")
        _picture(console, picture, how_dealt(anatomy.plan))
    _heading(console, "tokens")
    _line(console, bar(anatomy))
    _legend(console)
    _tokens(console, anatomy)
    _heading(console, "counts")
    for name, value in counts_of(anatomy):
        _line(console, Text(f"{name:<18}", style="bold").append(value, style="not bold"))
    for note in anatomy.plan.notes():
        _line(console, note)


def print_refusal(console: Console, key: str, sentence: str, stored: Stored, title: str) -> None:
    """Why there is nothing to show, and the record as it is stored."""
    _heading(console, safe(key))
    _line(console, safe(title))
    _line(console, Text("REFUSED  ", style="bold red").append(safe(sentence), style="not bold red"))
    _heading(console, "the record as it is stored")
    _line(console, NOT_AT_HAND if stored.json is None else shortened(safe(stored.json, lines=True)))


def shortened(text: str) -> str:
    """At most `MOST_TEXT` characters, and how many there are more."""
    rest = len(text) - MOST_TEXT
    return text if rest <= 0 else f"{text[:MOST_TEXT]} ... ({rest:,} more characters; the page has all)"


def bar(anatomy: Anatomy) -> Text:
    """All positions as one bar; each sign is the rarest of what it stands for, so that nothing small is lost."""
    total = sum(piece.count for piece in anatomy.pieces)
    signs = min(BAR, total)
    counts = {kind: sum(p.count for p in anatomy.pieces if p.kind == kind) for kind in MARKS}
    found: list[set[str]] = [set() for _ in range(signs)]
    for piece in anatomy.pieces:
        last = piece.position + piece.count - 1
        for sign in range(piece.position * signs // total, last * signs // total + 1):
            found[sign].add(piece.kind)
    text = Text("[")
    for kinds in found:
        kind = min(kinds, key=lambda kind: counts[kind])
        text.append(MARKS[kind], style=STYLES[kind].replace(" underline", "").replace(" strike", ""))
    return text.append("]")


def _heading(console: Console, text: str) -> None:
    console.print()
    _line(console, Text(text, style="bold"))


def _line(console: Console, text: Text | str) -> None:
    """Printed as it is: no markup, no highlighting, whole words to the next line."""
    console.print(Text(text) if isinstance(text, str) else text, highlight=False, markup=False, emoji=False)


def _legend(console: Console) -> None:
    text = Text()
    for kind, says in (
        ("given", "given"),
        ("learned", "learned: id, then =label<position that predicts it"),
        ("image", "image"),
        ("cut", "cut off"),
    ):
        text.append(f"{MARKS[kind]} ", style="bold").append(says, style=STYLES[kind]).append("   ")
    _line(console, text.append("[special]   ␣ space   ↵ line end"))


def _picture(console: Console, picture: Picture, dealt: str) -> None:
    for board in picture.boards:
        _line(console, f"  {board_line(board)}{f', {dealt}' if board.groups and len(board.groups) > 1 else ''}")
        if board.grid != (1, 1):
            for line in _drawn(board, console.width - 4):
                _line(console, Text("    ").append(line))
    for group in picture.groups:
        text = Text("  ").append(f" {symbol(group.dealt)} ", style=f"bold white on {colour(group.dealt)}")
        _line(console, text.append(f" {group_line(group)}"))


def _drawn(board: Board, width: int) -> Iterator[Text]:
    """The board's views as boxes, in each the groups of its top left corner's tokens; tiles by number."""
    columns, rows = board.grid
    tokens = next((mask.shape[1] // columns for mask in board.groups.values()), 0)
    most = _CORNER if columns * rows <= _CORNER else _CORNER // 2
    side = max(1, min(most, tokens, (width // columns - 3) // 2))
    inner = max(2 * side + 1, 5)
    for row in range(rows):
        yield _rule("├┼┤" if row else "┌┬┐", inner, [_name(board, row, column, inner) for column in range(columns)])
        for y in range(side if board.groups else 1):
            line = Text("│")
            for column in range(columns):
                signs = [_sign(board, row, column, y, x) for x in range(side)]
                line.append(" ").append(Text(" ").join(signs)).append(" " * (inner - 2 * side)).append("│")
            yield line
    yield _rule("└┴┘", inner, [""] * columns)


def _rule(ends: str, inner: int, names: list[str]) -> Text:
    left, cross, right = ends
    return Text(left + cross.join(name.ljust(inner, "─") for name in names) + right)


def _name(board: Board, row: int, column: int, inner: int) -> str:
    """The tile whose first view lies there."""
    across = board.grid[0] // board.block
    if row % board.block or column % board.block or board.grid == (board.block, board.block):
        return ""
    number = row // board.block * across + column // board.block
    return f"─tile {number}" if inner >= 9 else f"─{number}"


def _sign(board: Board, row: int, column: int, y: int, x: int) -> Text:
    for dealt, mask in board.groups.items():
        side = mask.shape[1] // board.grid[0]
        if y < side and x < side and mask[row * side + y, column * side + x]:
            return Text(symbol(dealt), style=f"bold {colour(dealt)}")
    return Text(" ")


def _tokens(console: Console, anatomy: Anatomy) -> None:
    """Three lines under each other: the token, its id, and what is learned of it; what is cut off behind a bar."""
    kept = [piece for piece in anatomy.pieces if not piece.cut]
    cut = [piece for piece in anatomy.pieces if piece.cut]
    _part(console, kept, "")
    if cut:
        _line(console, Text(f"CUT OFF from here: {lost(anatomy)}", style="bold red"))
        _part(console, cut, "cut | ")


def _part(console: Console, pieces: Sequence[Piece], gutter: str) -> None:
    head, left_out = MOST_PIECES * 3 // 4, len(pieces) - MOST_PIECES
    parts = [pieces] if left_out <= 0 else [pieces[:head], pieces[head + left_out :]]
    for number, part in enumerate(parts):
        if number:
            _line(console, f"{gutter}... {left_out:,} more; the page has all ...")
        for row in _rows(part, console.width - len(gutter)):
            for line in range(3 if any(piece.learned for piece in row) else 2):
                text = Text(gutter, style="red")
                for piece in row:
                    cells = _cells(piece)
                    room = max(cell_len(cell) for cell in cells) + _GAP
                    style = STYLES[piece.kind] if line == 0 else "green" if line == 2 else "bright_black"
                    text.append(cells[line], style=style)
                    text.append(" " * (room - cell_len(cells[line])))
                text.rstrip()
                console.print(text, highlight=False, no_wrap=True, overflow="ellipsis")


def _rows(pieces: Iterable[Piece], width: int) -> Iterator[list[Piece]]:
    row: list[Piece] = []
    used = 0
    for piece in pieces:
        room = max(cell_len(cell) for cell in _cells(piece)) + _GAP
        if row and used + room > width:
            yield row
            row, used = [], 0
        row.append(piece)
        used += room
    if row:
        yield row


def _cells(piece: Piece) -> tuple[str, str, str]:
    shown = token_text(piece.text)
    if piece.image is not None:
        return f"[{shown} x {piece.count:,}]", f"{piece.id} image {piece.image}", ""
    learned = f"={piece.label}<{piece.position - 1}" if piece.learned else ""
    return f"[{shown}]" if piece.special else shown, str(piece.id), learned
