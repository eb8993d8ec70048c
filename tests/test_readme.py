"""What the README tells people to type."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from deepstack_pl.language.config import LLMConfig
from deepstack_pl.language.conversation import load_tokenizer
from deepstack_pl.multimodal.build import build_model
from deepstack_pl.multimodal.config import ProjectorConfig
from deepstack_pl.multimodal.processor import DeepStackProcessor
from deepstack_pl.stacking.config import ModelConfig
from deepstack_pl.vision.config import VisionConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TYPED = {line.split("  #")[0].strip() for line in re.findall(r"^ +python (train\.py.*)$", README, re.M)}
COMMANDS = sorted(c for c in TYPED if "--help" not in c and "ckpt_path" not in c)  # tests/cli types these two


def save_a_run(folder: Path) -> None:
    vision = VisionConfig(name="tiny", image_size=16, patch_size=4, width=16, layers=3, heads=2)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 6}
    llm = LLMConfig(name="tiny", family="llama", architecture=sizes | {"vocab_size": 512})
    tokenizer = load_tokenizer(None)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    assert isinstance(image_token, int)
    model = build_model(
        ModelConfig(name="deepstack_l"), llm, vision, ProjectorConfig(), seed=0, image_token_id=image_token
    )
    model.save_pretrained(folder)
    made = DeepStackProcessor(tokenizer, plan=model.plan, vision=vision, template="shipped", max_length=256)
    made.save_pretrained(folder)


def test_the_notebook_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    save_a_run(tmp_path / "outputs" / "RUN")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "page.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert "layer  4 | <- group 3" in capsys.readouterr().out


def test_every_folder_and_page_it_names_is_there() -> None:
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / link).exists(), link
    for folder in re.findall(r"^\| `([a-z_/]+/)`", README, re.M):
        assert (ROOT / folder).is_dir(), folder


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes(command: str, tmp_path: Path) -> None:
    (tmp_path / "my_plans" / "model").mkdir(parents=True)
    plan = re.search(r"# my_plans/model/late.yaml\n(.*?)\n\n", README, re.S)
    assert plan is not None
    (tmp_path / "my_plans" / "model" / "late.yaml").write_text("\n".join(x.strip() for x in plan[1].splitlines()))
    save_a_run(tmp_path / "outputs" / "RUN")
    words = shlex.split(command)
    if "dry_run=true" not in words:
        words.append("dry_run=true")
    done = subprocess.run(
        [sys.executable, str(ROOT / words[0]), *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "what learns" in done.stdout


def typed(text: str, command: str) -> list[list[str]]:
    return [line.split("  #")[0].split() for line in re.findall(rf"^ +deepstack ({command} .*)$", text, re.M)]


def deepstack(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).with_name("deepstack")
    return subprocess.run([script, *words], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_commands_for_published_models_do_what_stands_beside_them(tmp_path: Path) -> None:
    words = typed(README, "(?:parity|convert)")
    assert [each[0] for each in words] == ["parity", "convert", "convert", "convert"]
    save_a_run(tmp_path / "outputs" / "RUN")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    parity, by_name, back, qwen = (deepstack(each, tmp_path) for each in words)
    assert (parity.returncode, back.returncode) == (0, 0), parity.stdout + back.stderr
    assert "24 cases: 24 equal the published code" in parity.stdout
    assert (tmp_path / "theirs" / "model.safetensors").is_file()
    assert (by_name.returncode, qwen.returncode) == (1, 1)  # offline
    assert "menglc/deepstack-l-vicuna-7b" in by_name.stderr
    assert "Qwen/Qwen3-VL-8B-Instruct" in qwen.stderr


@pytest.mark.slow
def test_the_commands_for_corpora_do_what_stands_beside_them(tmp_path: Path) -> None:
    """The README's and docs/data.md's, one after the other."""
    script = ROOT / "tests" / "data" / "replicas.py"
    subprocess.run([sys.executable, str(script), "llava665k", str(tmp_path / "DIR"), "--clean"], check=True)
    words = typed(README, "shards")
    assert [each[1] for each in words] == ["build", "verify", "show", "plan"]
    build, verify, show, plan = (deepstack(each, tmp_path) for each in words)
    for done in (build, verify, show, plan):
        assert done.returncode == 0, done.stdout + done.stderr
    assert "all whole" in verify.stdout
    assert list((tmp_path / "outputs" / "show").glob("*.html"))
    for batching in ("samples", "modality_length", "token_budget", "packed"):
        assert batching in plan.stdout
    for each in typed((ROOT / "docs" / "data.md").read_text(encoding="utf-8"), "shards"):
        assert each in words or deepstack(each, tmp_path).returncode == 0
