"""A plan as text, for terminals and logs. Loads without torch."""

from typing import TYPE_CHECKING

from deepstack_pl.stacking.config import Encoding, Host, Newline, Operator, Order, Resize, Sequence, Unfilled

if TYPE_CHECKING:
    from deepstack_pl.stacking.plan import Plan

_MARKS = {Operator.add: "", Operator.gated_add: " (gated)", Operator.noise: " (noise)"}


def sketch(plan: "Plan") -> str:
    """The plan as text, the output on top."""
    rows = [f"plan {plan.name} ({plan.digest})", ""]
    for host, last in ((Host.llm, plan.llm_layers - 1), (Host.vit, plan.vit_layers)):
        layers = plan.at(host)
        for layer in range(last, -1, -1):
            feature = host is Host.vit and layer == last
            label = "feature " if feature else f"{'layer' if host is Host.llm else 'block'} {layer:2}"
            arrows = "".join(f" <- {i.what}{_MARKS[i.operator]}" for i in layers.get(layer, ()))
            taps = plan.taps if host is Host.vit else ()
            reads = "".join(f" -> tap {k}" for k, tap in enumerate(taps) if tap == layer)
            rows.append(f"  {host.name} {label} |{arrows}{reads}")
        rows.append(f"  {'text and ' + _sequence_text(plan) if host is Host.llm else _views_text(plan)}")
        rows.append("")
    if not plan.injections:
        rows.append("  no injections: nothing is stacked")
    rows += [f"  dropped beyond the depth: {i}" for i in plan.dropped]
    rows += [f"  {note}" for note in plan.notes()]
    return "\n".join(rows).rstrip()


def _sequence_text(plan: "Plan") -> str:
    tiles = f"{plan.most_tiles} groups" if plan.order is Order.by_group else "the mosaic row by row"
    newline = ", a newline after each row" if plan.newline is not Newline.none else ""
    again = ", added again with each group" if plan.newline is Newline.rows_and_groups else ""
    zeros = ", unfilled ones as zeros" if plan.unfilled is Unfilled.zeros else ""
    return {
        Sequence.global_view: "global view",
        Sequence.global_and_tiles: f"global view and {tiles}{zeros}{newline}{again}",
        Sequence.tiles: f"{tiles}{zeros}{newline}",
        Sequence.blank: "a blank for each token of the global view",
        Sequence.channels: f"global view with {tiles} beside it in its channels",
    }[plan.sequence] + (f", {plan.pooling}x{plan.pooling} tokens as one" if plan.pooling > 1 else "")


def _views_text(plan: "Plan") -> str:
    texts = ["global view"]
    if plan.tiles:
        how = ", letter-boxed" if plan.resize is Resize.letterbox else ""
        how += ", read in one pass" if plan.encoding is Encoding.one_pass else ""
        texts.append(f"up to {plan.tiles} tiles ({plan.grid.value}{how})")
    if plan.detail > 1:
        texts.append(f"{plan.detail}x{plan.detail} details of each")
    dealt = f", dealt {plan.dealing.value}" if len(texts) > 1 else ""
    return " and ".join(texts) + dealt
