"""What injections do inside: against models that lack them, sums by hand, and nothing left behind."""

from dataclasses import replace

import pytest
import torch
from small_run import LLM, STACKED, Pages, small_model, small_processor

from deepstack_pl.batch import Record, Role, Turn
from deepstack_pl.inspection import inside
from deepstack_pl.inspection.inside import look_inside
from deepstack_pl.inspection.inside_figures import inside_figures
from deepstack_pl.stacking.config import Host, InjectionConfig, ModelConfig, Operator
from deepstack_pl.stacking.config import Sequence as InText

RECORDS = [Pages()[0], Pages()[1]]
TEXT = Record(key="text", turns=(Turn(Role.user, "Which?"), Turn(Role.assistant, "red")), images=())


def loss_of(model, config: ModelConfig) -> float:
    """Of a model with the weights of ``model`` under another plan."""
    other = small_model(config)
    other.load_state_dict(model.state_dict())
    processor = small_processor(config)
    batch = processor.collate([processor.prepare(record) for record in RECORDS])
    with torch.no_grad():
        return float(other.eval()(**batch.model_inputs()).loss)


@pytest.mark.parametrize("host", list(Host))
def test_leaving_one_out_costs_what_a_model_without_it_loses(host: Host) -> None:
    config = replace(STACKED, host=host, start_layer=0)
    model = small_model(config)
    found = look_inside(model, small_processor(config), RECORDS)
    assert found.loss == pytest.approx(loss_of(model, config), abs=1e-6)
    for k, effect in enumerate(found.effects):
        if host is Host.vit and k == 0:
            continue  # without the first one the tower's groups would be read a block later
        others = [InjectionConfig(layer=j, group=j, host=host) for j in range(4) if j != k]
        without = loss_of(model, replace(config, groups=0, injections=others))
        assert effect.left_out == pytest.approx(without - found.loss, abs=1e-6)
        assert effect.left_out != 0
    assert found.loss_without == pytest.approx(loss_of(model, replace(config, groups=0)), abs=1e-6)


def test_the_gradient_is_what_the_loss_gains_along_it() -> None:
    """A gated injection whose gate is opened a little more: the loss moves by gradient times addition."""
    config = replace(STACKED, operator=Operator.gated_add, groups=1)
    model, processor = small_model(config), small_processor(config)
    model.gates["llm"].data.fill_(0.5)
    (effect,) = look_inside(model, processor, RECORDS).effects
    batch = processor.collate([processor.prepare(RECORDS[0])])
    output = model.eval()(**batch.model_inputs(), record=True)
    (trace,) = output.record
    (gradient,) = torch.autograd.grad(output.loss, [trace.added])
    step, scale = 0.1, float(model.gates["llm"].detach().tanh())
    losses = []
    for sign in (1, -1):
        model.gates["llm"].data.fill_(float(torch.atanh(torch.tensor(scale + sign * step))))
        losses.append(float(model(**batch.model_inputs()).loss))
    along = float((gradient * trace.added).sum()) / scale  # per unit of tanh(gate)
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(along, rel=0.05)
    assert effect.gradient == pytest.approx(float(gradient[trace.touched].norm()), rel=1e-5)


def test_sizes_and_cosine_are_of_the_stream_before_and_the_addition() -> None:
    model, processor = small_model(), small_processor()
    batch = processor.collate([processor.prepare(record) for record in RECORDS])
    seen = []
    layer = model.language_model.model.layers[2]
    layer.register_forward_hook(lambda *args: None)
    hook = model.language_model.model.layers[1].register_forward_hook(lambda *a: seen.append(a[2]))
    with torch.no_grad():
        traces = model.eval()(**batch.model_inputs(), record=True).record
    hook.remove()
    before = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    visual = batch.input_ids == processor.image_token_id
    effect = look_inside(model, processor, RECORDS).effects[1]
    cosine = torch.cosine_similarity(before[visual], traces[1].added[visual], dim=-1).mean()
    assert effect.cosine == pytest.approx(float(cosine), abs=1e-5)
    assert effect.stream == pytest.approx(float(before[visual].square().mean().sqrt()), rel=1e-5)
    assert effect.ratio == pytest.approx(effect.added / effect.stream)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_share_of_attention_is_summed_over_visual_positions_of_those_that_write(attention: str) -> None:
    model, processor = small_model(), small_processor()
    model.language_model.set_attn_implementation(attention)
    found = look_inside(model, processor, RECORDS).attention
    assert model.language_model.config._attn_implementation == attention
    assert found is not None
    sample = processor.prepare(RECORDS[0])
    batch = processor.collate([sample])
    model.language_model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model.eval()(**batch.model_inputs(), output_attentions=True).attentions
    learned = [place for place, label in enumerate(sample.labels.tolist()) if label != -100]
    visual = [place for place, token in enumerate(sample.input_ids.tolist()) if token == processor.image_token_id]
    assert len(visual) == 16
    for layer, share in enumerate(found.with_all):
        by_hand = [
            sum(float(maps[layer][0, head, place - 1, v]) for v in visual) for place in learned for head in range(4)
        ]
        assert share == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-5)
    first = [float(maps[found.layer][0, :, learned[0] - 1, v].mean()) for v in visual]
    assert found.grid is not None
    assert found.grid.flatten().tolist() == pytest.approx(first, abs=1e-5)
    assert found.without != found.with_all


def test_nothing_is_left_behind() -> None:
    model, processor = small_model().train(), small_processor()
    model.language_model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    look_inside(model, processor, RECORDS)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_attention_that_cannot_be_had_is_a_note_and_the_old_kernel_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = small_model(), small_processor()
    monkeypatch.setattr(inside, "_MOST", 1)
    assert "would take" in look_inside(model, processor, RECORDS).note
    monkeypatch.undo()
    own = model.language_model.set_attn_implementation

    def no_eager(kind: str) -> None:
        own("sdpa")  # whatever is asked for

    monkeypatch.setattr(model.language_model, "set_attn_implementation", no_eager)
    found = look_inside(model, processor, RECORDS)
    assert found.attention is None
    assert "does not hand its attention out" in found.note
    assert model.language_model.config._attn_implementation == "sdpa"


def test_text_alone_has_no_attention_on_images_and_frozen_models_no_gradient() -> None:
    model, processor = small_model(), small_processor()
    assert "none of the pages has an image" in look_inside(model, processor, [TEXT]).note
    model.requires_grad_(False)
    assert all(effect.gradient is None for effect in look_inside(model, processor, RECORDS).effects)


@pytest.mark.parametrize(
    ("config", "tags"),
    [
        (STACKED, {"injections/left out", "injections/in the stream", "attention/visual share", "attention/map"}),
        (ModelConfig(name="baseline", tiles=0, groups=0), {"attention/visual share", "attention/map"}),
        (ModelConfig(name="s", groups=0, sequence=InText.tiles), {"attention/visual share"}),
    ],
)
def test_every_plan_has_the_figures_that_it_has_numbers_for(config: ModelConfig, tags: set[str]) -> None:
    found = look_inside(small_model(config), small_processor(config), RECORDS)
    figures = inside_figures(found, small_processor(config).plan, RECORDS[0].images[0])
    assert set(figures) == tags
    assert bool(found.effects) == ("injections/left out" in tags)
    assert set(found.to_dict()) == {"loss", "loss_without", "effects", "attention", "note"}


def test_another_family_of_llm_hands_its_attention_out_too() -> None:
    llm = replace(LLM, family="qwen3")
    model = small_model(STACKED, llm)
    assert look_inside(model, small_processor(), RECORDS).attention is not None
