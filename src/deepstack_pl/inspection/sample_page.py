"""A record as one page that stands alone: pictures inside it, no scripts, nothing fetched.

Text of the record is escaped and cannot act; the page forbids scripts and addresses besides.
"""

import html
from collections.abc import Sequence
from itertools import groupby

import numpy as np

from deepstack_pl.batch import Record
from deepstack_pl.inspection.anatomy import Anatomy, Board, Group, Piece, how_dealt
from deepstack_pl.inspection.plots import colour, plan_figure, to_pixels
from deepstack_pl.inspection.sample_board import board_figures, png_uri
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

_THUMB = 420  # longest side of a stored picture on the page

_STYLE = """
:root { --ink:#1d2126; --pale:#666d75; --rule:#e3e5e8; --paper:#f6f7f8; --green:#08683f; --blue:#0b5fa5;
  --red:#b3261e; }
* { box-sizing:border-box; }
body { margin:0 auto; padding:2rem 1.5rem 4rem; max-width:72rem; color:var(--ink); background:#fff;
  font:15px/1.5 system-ui,"DejaVu Sans",sans-serif; }
h1 { font-size:1.35rem; margin:0 0 .2rem; overflow-wrap:anywhere; }
h2 { font-size:1.05rem; margin:2.4rem 0 .7rem; padding-bottom:.3rem; border-bottom:1px solid var(--rule); }
p { margin:.3rem 0 .7rem; } .pale,figcaption { color:var(--pale); font-size:.86rem; }
code,pre,.token,.id { font-family:ui-monospace,"DejaVu Sans Mono",monospace; }
pre { background:var(--paper); padding:.8rem 1rem; border-radius:6px; white-space:pre-wrap; overflow-wrap:anywhere;
  font-size:.84rem; unicode-bidi:plaintext; }
.facts { display:flex; flex-wrap:wrap; gap:.6rem; margin:1.2rem 0; padding:0; list-style:none; }
.facts li { background:var(--paper); border-radius:6px; padding:.5rem .9rem; }
.facts b { display:block; font-size:1.05rem; font-variant-numeric:tabular-nums; }
.facts span { color:var(--pale); font-size:.82rem; } .facts .bad b { color:var(--red); }
.turn { display:grid; grid-template-columns:6.2rem 1fr; gap:.8rem; margin:.35rem 0; }
.turn > b { color:var(--pale); font-weight:600; }
@media screen { .turn > div { max-height:24rem; overflow:auto; } }
.turn > div { white-space:pre-wrap; overflow-wrap:anywhere; unicode-bidi:plaintext; }
.boards { display:flex; flex-wrap:wrap; gap:1.1rem; align-items:flex-start; margin:.4rem 0 1.2rem; }
figure { margin:0; max-width:100%; }
svg,img { display:block; max-width:100%; height:auto; border:1px solid var(--rule); }
figcaption { margin-top:.3rem; }
.groups { list-style:none; margin:.4rem 0 1.2rem; padding:0; } .groups li { margin:.15rem 0; }
.sign { display:inline-block; min-width:1.6em; text-align:center; margin-right:.5em; border-radius:3px; color:#fff;
  font:bold .86rem/1.5 ui-monospace,"DejaVu Sans Mono",monospace; }
path.tile { stroke:#fff; stroke-width:2.5px; vector-effect:non-scaling-stroke; fill:none; }
path.detail { stroke:#fff; stroke-width:1px; stroke-dasharray:4 3; vector-effect:non-scaling-stroke; fill:none; }
text.name { fill:#fff; font-weight:600; paint-order:stroke; stroke:#000a; stroke-width:.22em; }
.signs { font-weight:bold; font-family:ui-monospace,"DejaVu Sans Mono",monospace; text-anchor:middle; fill:#fff;
  paint-order:stroke; stroke:#000a; stroke-width:.18em; }
.bar { width:100%; height:30px; }
.tokens { line-height:1; margin-top:.8rem; }
.token { display:inline-block; vertical-align:top; margin:0 3px 7px 0; padding:3px 5px 4px; border-radius:4px;
  background:#eceef0; color:#3d444b; text-align:center; unicode-bidi:isolate; font-size:.86rem; max-width:100%; }
.token b { display:block; font-weight:500; white-space:pre; overflow-wrap:anywhere; line-height:1.35; }
.token small { display:block; font-size:.68rem; color:#596069; font-variant-numeric:tabular-nums; line-height:1.3; }
.learned { background:#dff2e6; color:var(--green); } .learned b { font-weight:700; text-decoration:underline 2px; }
.learned small { color:var(--green); }
.image { background:#dcebf8; color:var(--blue); padding-inline:1.1em; } .image b { font-weight:700; }
.image small { color:var(--blue); }
.special { box-shadow:inset 0 0 0 1.5px currentColor; }
.cut { background:#fbe3e1; color:var(--red); } .cut b { text-decoration:line-through; } .cut small { color:var(--red); }
.edge { color:var(--red); font-weight:700; border-left:4px solid var(--red); padding:.3rem .7rem; margin:.5rem 0; }
.refused { border-left:5px solid var(--red); background:#fdf1f0; padding:.8rem 1.1rem; border-radius:0 6px 6px 0; }
summary { cursor:pointer; color:var(--pale); }
"""


def sample_page(anatomy: Anatomy, stored: Stored, title: str, notes: Sequence[str] = ()) -> str:
    """The page of a sample; ``title`` says which record of what, ``notes`` what else is to be known."""
    record, plan = anatomy.record, anatomy.plan
    line = f"{title} · source {record.source or '(none)'} · plan {plan.name} ({plan.digest}) · template"
    body = [
        f"<h1>{_text(record.key)}</h1>",
        f'<p class="pale">{_text(line)} {_text(anatomy.template)}</p>',
        *(f'<p class="pale">{_text(note)}</p>' for note in notes),
        _facts(anatomy),
        "<h2>Conversation</h2>",
        *_turns(record),
        *_pictures(anatomy, stored),
        "<h2>Tokens</h2>",
        _bar(anatomy),
        _legend(anatomy),
        *_tokens(anatomy),
        "<h2>Plan</h2>",
        *(f'<p class="pale">{_text(note)}</p>' for note in plan.notes()),
        f'<img alt="drawing of the plan" src="{png_uri(to_pixels(plan_figure(plan, anatomy.tokens_per_view)))}">',
    ]
    return _page(record.key, [*body, _stored(stored)])


def refusal_page(key: str, sentence: str, stored: Stored, title: str) -> str:
    """The page of a record that is not trained on: why, and what lies on disk."""
    why = f'<p class="refused"><b>Refused.</b> {_text(sentence)}</p>'
    body = [f"<h1>{_text(key)}</h1>", f'<p class="pale">{_text(title)}</p>', why, _stored(stored, whole=True)]
    return _page(key, body)


def _page(title: str, body: list[str]) -> str:
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>",
            *body,
            "</body></html>\n",
        ]
    )


def _text(text: str) -> str:
    return html.escape(safe(text))


def _lines(text: str) -> str:
    return html.escape(safe(text, lines=True))


def _facts(anatomy: Anatomy) -> str:
    items = []
    for name, value in counts_of(anatomy):
        bad = ' class="bad"' if name == "cut off" and anatomy.cut else ""
        items.append(f"<li{bad}><b>{_text(value)}</b><span>{_text(name)}</span></li>")
    return f'<ul class="facts">{"".join(items)}</ul>'


def _turns(record: Record) -> list[str]:
    return [f'<div class="turn"><b>{turn.role.value}</b><div>{_lines(turn.text)}</div></div>' for turn in record.turns]


def _pictures(anatomy: Anatomy, stored: Stored) -> list[str]:
    parts: list[str] = []
    for number, picture in enumerate(anatomy.pictures):
        known = stored.image(number)
        parts.append(f"<h2>Image {number}</h2><p>{_text(f'{known}, ' if known else '')}")
        parts.append(f"{_text(picture_line(anatomy, number))}</p>")
        if anatomy.cut_of(number):
            parts.append(f'<p class="edge">{anatomy.cut_of(number):,} positions of this image are cut off.</p>')
        parts.append(f'<div class="boards">{_thumbnail(anatomy.record, number)}')
        for place, board in enumerate(picture.boards):
            parts += ['</div><div class="boards">'] if place else []
            parts += board_figures(board, f"i{number}b{place}", _caption(anatomy, board))
        parts.append("</div>")
        if picture.groups:
            parts.append(f'<ul class="groups">{"".join(_group(group) for group in picture.groups)}</ul>')
    return parts or ['<h2>Images</h2><p class="pale">None: the sample is text alone.</p>']


def _thumbnail(record: Record, number: int) -> str:
    image = record.images[number].convert("RGB")
    size = f"{image.width} x {image.height}"
    image.thumbnail((_THUMB, _THUMB))
    shown = f'<img alt="the image as stored" src="{png_uri(np.asarray(image))}">'
    return f"<figure>{shown}<figcaption>as stored, {size}, for comparison</figcaption></figure>"


def _caption(anatomy: Anatomy, board: Board) -> str:
    return board_line(board) + (f", {how_dealt(anatomy.plan)}" if len(board.groups) > 1 else "")


def _group(group: Group) -> str:
    shown = f'<span class="sign" style="background:{colour(group.dealt)}">{symbol(group.dealt)}</span>'
    return f"<li>{shown}{_text(group_line(group))}</li>"


def _bar(anatomy: Anatomy) -> str:
    """All positions in their order, as long as they are many; learned ones hatched, cut ones crossed."""
    total = sum(piece.count for piece in anatomy.pieces)
    looks = {"given": "#c9ced3", "image": "#8dbbe3", "learned": "url(#hatch)", "cut": "url(#cross)"}
    rects = []
    for kind, run in groupby(anatomy.pieces, key=lambda piece: piece.kind):
        pieces = list(run)
        count, x = sum(piece.count for piece in pieces), 1000 * pieces[0].position / total
        label = f"{kind}: positions {pieces[0].position:,} to {pieces[0].position + count - 1:,}"
        width = max(1.5, 1000 * count / total)
        rects.append(
            f'<rect x="{x:.2f}" width="{width:.2f}" height="30" fill="{looks[kind]}"><title>{label}</title></rect>'
        )
    hatch = '<path d="M0 6L6 0" stroke="#fff" stroke-width="1.4"/>'
    cross = f'{hatch}<path d="M0 0L6 6" stroke="#fff" stroke-width="1.4"/>'
    patterns = "".join(
        f'<pattern id="{name}" width="6" height="6" patternUnits="userSpaceOnUse">'
        f'<rect width="6" height="6" fill="{fill}"/>{lines}</pattern>'
        for name, fill, lines in (("hatch", "#0b7a4b", hatch), ("cross", "#c0392b", cross))
    )
    return (
        f'<svg class="bar" viewBox="0 0 1000 30" preserveAspectRatio="none" role="img" '
        f'aria-label="all positions"><defs>{patterns}</defs>{"".join(rects)}</svg>'
    )


def _legend(anatomy: Anatomy) -> str:
    parts = [
        '<span class="token"><b>given</b></span>',
        '<span class="token learned"><b>learned</b></span>',
        '<span class="token image"><b>image</b></span>',
        '<span class="token special"><b>special</b></span>',
        *(['<span class="token cut"><b>cut off</b></span>'] if anatomy.cut else []),
    ]
    says = (
        "Under each token: its position, then its id. A learned token's label is unshifted, so it equals the id; "
        "what is compared with it is the prediction made at the position after the arrow. "
        "In the bar above, learned positions are hatched and cut ones crossed. ␣ space, ↵ line end."
    )
    return f'<div class="tokens">{"".join(parts)}</div><p class="pale">{says}</p>'


def _tokens(anatomy: Anatomy) -> list[str]:
    """The flow of tokens; a line end ends a line, and the cut stands where it is."""
    parts, cut = ['<div class="tokens">'], False
    for piece in anatomy.pieces:
        if piece.cut and not cut:
            cut = True
            says = f"Cut off from here: {lost(anatomy)}; llm.max_length={anatomy.max_length:,}."
            parts.append(f'<p class="edge">{_text(says)}</p>')
        parts.append(_token(piece))
        if "\n" in piece.text:
            parts.append("<br>")
    return [*parts, "</div>"]


def _token(piece: Piece) -> str:
    kind = f"token {piece.kind if piece.kind != 'given' else ''}{' special' if piece.special else ''}"
    shown = html.escape(token_text(piece.text))
    if piece.image is not None:
        last = piece.position + piece.count - 1
        line = f"{piece.position:,} to {last:,} · id {piece.id} · image {piece.image}"
        return f'<span class="{kind}"><b>{shown} x {piece.count:,}</b><small>{line}</small></span>'
    label = ""
    if piece.learned:
        equal = "=" if piece.label == piece.id else "DIFFERS FROM ID:"
        label = f"<small>label {equal} {piece.label} ← {piece.position - 1}</small>"
    return f'<span class="{kind}"><b>{shown}</b><small>{piece.position} · {piece.id}</small>{label}</span>'


def _stored(stored: Stored, *, whole: bool = False) -> str:
    if stored.json is None:
        return f'<p class="pale">The record as it is stored: {NOT_AT_HAND}.</p>'
    opened = " open" if whole else ""
    return f"<details{opened}><summary>the record as it is stored</summary><pre>{_lines(stored.json)}</pre></details>"
