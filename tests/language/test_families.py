"""What conf/llm says of each LLM, and what its tiny twin keeps."""

import json
import re
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from llms import GRANITE, NAMES, option, twin
from transformers import AutoModelForCausalLM

from deepstack_pl.cli.checks import check_architecture
from deepstack_pl.language.config import LLMConfig, LLMInit, Size
from deepstack_pl.language.template import TEMPLATES
from deepstack_pl.language.tiny import shrink
from deepstack_pl.multimodal.build import checkpoint_config, text_config

PARAMETERS = {  # of the published weights
    "phi3": 3_821_079_552,
    "vicuna_7b": 6_738_415_616,
    "vicuna_13b": 13_015_864_320,
    "llama3_8b": 8_030_261_248,
    "qwen3_0_6b": 596_049_920,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "smollm2_135m": 134_515_008,
    "smollm2_1_7b": 1_711_376_384,
    "mistral_7b": 7_248_023_552,
    "gemma3_1b": 999_885_952,
}
DOCS = (Path(__file__).parents[2] / "docs" / "llms.md").read_text()
PUBLISHED = json.loads((Path(__file__).parent / "published_configs.json").read_text())


def saved(config: dict[str, Any], folder: Path) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("name", NAMES)
def test_conf_describes_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text_config(option(name)))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_the_table_of_the_docs_says_what_conf_says() -> None:
    rows = {
        row[0]: row[1:] for row in re.findall(r"^\| `(\w+)` \| (\S+) \| ([\d,]+) \| (\d+) \| `(\w+)` \|", DOCS, re.M)
    }
    assert sorted(rows) == NAMES
    for name, (checkpoint, parameters, context, template) in rows.items():
        llm = option(name)
        assert (checkpoint, template) == (llm.checkpoint, llm.template)
        assert int(parameters.replace(",", "")) == PARAMETERS[name]
        assert int(context) == llm.architecture["max_position_embeddings"]
        assert llm.max_length == 4096


def test_the_page_of_the_docs_is_a_whole_llm(tmp_path: Path) -> None:
    page = re.search(r"    # my_llms/llm/(\w+)\.yaml\n((?:    .*\n)+)", DOCS)
    assert page is not None
    (tmp_path / f"{page[1]}.yaml").write_text(dedent(page[2]))
    llm = option(page[1], tmp_path)
    check_architecture(llm)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text_config(llm))
    assert sum(p.numel() for p in model.parameters()) == 361_821_120  # as published
    assert text_config(replace(llm, size=Size.tiny)).num_attention_heads == 3


@pytest.mark.parametrize("name", PUBLISHED)
def test_conf_agrees_with_the_published_configuration(name: str, tmp_path: Path) -> None:
    llm = replace(option(name), init=LLMInit.pretrained, checkpoint=saved(PUBLISHED[name], tmp_path))
    assert checkpoint_config(llm).vocab_size == llm.architecture["vocab_size"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gemma3_1b", {"sliding_window_pattern": 2}),
        ("gemma3_1b", {"rope_local_base_freq": 5000}),
        ("gemma3_1b", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ("llama3_8b", {"rope_theta": 10000.0}),
        ("llama3_8b", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("qwen3_8b", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 30}),
        ("smollm2_135m", {"tie_word_embeddings": False}),
        ("mistral_7b", {"sliding_window": 4096}),
    ],
)
def test_a_checkpoint_whose_rotation_window_or_layers_are_others_is_refused(
    name: str, change: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = saved(PUBLISHED[name] | change, tmp_path)
    with pytest.raises(ValueError, match=r"conf and the checkpoint .* disagree"):
        checkpoint_config(replace(option(name), init=LLMInit.pretrained, checkpoint=checkpoint))


def test_scaled_rotation_written_in_conf_agrees_with_the_checkpoint_that_has_it(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    checkpoint = saved(PUBLISHED["llama3_8b"] | {"rope_scaling": scaling}, tmp_path)
    llm = replace(option("llama3_8b"), init=LLMInit.pretrained, checkpoint=checkpoint)
    llm.architecture["rope_scaling"] = dict(scaling)
    before = json.dumps(llm.architecture)
    check_architecture(llm)
    checkpoint_config(llm)
    assert json.dumps(llm.architecture) == before
    llm.architecture["rope_scaling"] = scaling | {"factor": 4.0}
    with pytest.raises(ValueError, match="disagree"):
        checkpoint_config(llm)


def test_other_ids_of_the_ends_of_texts_are_no_other_architecture(tmp_path: Path) -> None:
    checkpoint = saved(PUBLISHED["llama3_8b"] | {"eos_token_id": 128001}, tmp_path)
    llm = replace(option("llama3_8b"), init=LLMInit.pretrained, checkpoint=checkpoint)
    assert checkpoint_config(llm).eos_token_id == 128001


@pytest.mark.parametrize("name", NAMES)
def test_every_option_names_a_template_of_its_family(name: str) -> None:
    assert option(name).template in TEMPLATES.keys() - {"shipped", "plain"}


class TestTwin:
    @pytest.mark.parametrize("name", [*NAMES, "granite"])
    def test_it_is_small_and_keeps_what_makes_the_family(self, name: str) -> None:
        full, llm = option(name), twin(name, 40)
        check_architecture(llm)
        large, small = text_config(full).to_dict(), text_config(llm).to_dict()
        assert llm.layers == small["num_hidden_layers"] == len(small.get("layer_types", range(12))) == 12
        assert small["vocab_size"] == 512
        assert 90 <= small["hidden_size"] <= 100
        assert len({values["num_attention_heads"] // values["num_key_value_heads"] for values in (large, small)}) == 1
        assert {*small.get("layer_types", [])} == {*large.get("layer_types", [])}
        windows = [values.get("sliding_window") for values in (large, small)]
        assert windows in ([None, None], [windows[0], 32])
        for kept in ("tie_word_embeddings", "rope_parameters", "embedding_multiplier", "residual_multiplier"):
            assert small.get(kept) == large.get(kept)
        assert small["pad_token_id"] in (None, 0)

    def test_a_head_dim_of_its_own_stays_its_own(self) -> None:
        small = text_config(twin("qwen3_0_6b"))
        assert small.head_dim != small.hidden_size // small.num_attention_heads
        assert text_config(twin("gemma3_1b")).query_pre_attn_scalar == text_config(twin("gemma3_1b")).head_dim

    def test_a_value_that_is_smaller_as_written_is_kept(self) -> None:
        llm = twin("llama3_8b", 8)
        llm.architecture |= {"hidden_size": 64, "vocab_size": 300}
        assert (llm.layers, llm.built["hidden_size"], llm.built["vocab_size"]) == (8, 64, 300)

    def test_what_is_written_is_left_as_it_is(self) -> None:
        llm = twin("phi3", 32)
        before = json.dumps(llm.architecture)
        assert llm.built["vocab_size"] == 512
        assert json.dumps(llm.architecture) == before

    def test_layers_named_one_by_one_and_factors_by_frequency_are_cut_to_what_is_there(self) -> None:
        long = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
        phi3 = twin("phi3")
        phi3.architecture["rope_scaling"] = long
        assert len(text_config(phi3).rope_parameters["long_factor"]) == 12  # pairs of a head of 24
        named = {"layer_types": ["sliding_attention", "full_attention"] * 13, "num_hidden_layers": 26}
        assert shrink(named)["layer_types"] == ["sliding_attention", "full_attention"] * 6

    @pytest.mark.parametrize("heads", [(32, 32), (16, 8), (9, 3), (32, 8), (15, 3), (12, 2), (28, 4), (64, 8), (8, 1)])
    def test_heads_share_keys_as_in_the_family_and_divide_the_width(self, heads: tuple[int, int]) -> None:
        llm = twin("llama3_8b")
        llm.architecture |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
        small = text_config(llm)
        assert small.num_attention_heads // small.num_key_value_heads == heads[0] // heads[1]
        assert small.hidden_size % small.num_attention_heads == 0
        assert small.head_dim % 2 == 0

    def test_it_has_no_weights_to_load(self) -> None:
        with pytest.raises(ValueError, match=r"llm=x llm\.size=tiny: nobody trained the tiny twin"):
            LLMConfig(name="x", family="llama", init=LLMInit.pretrained, size=Size.tiny, architecture=dict(GRANITE))


def test_an_older_spelling_that_the_family_does_not_read_is_refused() -> None:
    llm = option("llama3_8b")
    llm.architecture["sliding_window_pattern"] = 6
    with pytest.raises(ValueError, match=r"Unknown key llm\.architecture\.sliding_window_pattern"):
        check_architecture(llm)
