"""What ``deepstack fetch`` knows by name. Loads without torch.

Weights are those that conf/llm and conf/vision name, corpora those of conf/data: their options are read, so that the
list cannot say anything else than they do. Sizes and licences are written down here, and a checkpoint without a line
here is fetched all the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

UNKNOWN = "see the hub page"
OPEN_CLIP = "vision.open_clip_weights"  # names a file, where other keys name a folder
# Weights as transformers and timm look for them, first choice and second; and what comes with them.
WEIGHTS, OTHERWISE = ("model*.safetensors",), ("pytorch_model*.bin",)
BESIDE = ("*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Something to fetch.

    Attributes:
        key: the value that points a run at a folder with it, given ``--to``; None for corpora.
        dataset: whether the repository is one of data sets.
        weights: patterns of the files to fetch; ``otherwise`` in their stead where there are none.
        folder: of a corpus, under ``data.root``: where its files go.
        unpack: of a corpus: an archive among its files, and the folder under ``data.root`` it goes to.
        size: bytes to fetch, as far as is known; ``sure`` if somebody looked.
        by_hand: what the hub does not have: under ``data.root`` where it goes, where it comes from, about how many GB.
    """

    name: str
    what: str
    repo: str
    key: str | None = None
    dataset: bool = False
    weights: tuple[str, ...] = WEIGHTS
    otherwise: tuple[str, ...] = OTHERWISE
    beside: tuple[str, ...] = BESIDE
    folder: str = ""
    unpack: tuple[str, str] | None = None
    size: int | None = None
    sure: bool = False
    licence: str = UNKNOWN
    by_hand: tuple[tuple[str, str, int], ...] = ()
    then: str = ""

    @property
    def disk(self) -> int | None:
        """About how many bytes it takes in all; pictures are as large in their archive as beside it."""
        if self.size is None:
            return None
        return self.size * (2 if self.unpack else 1) + sum(gigabytes for *_, gigabytes in self.by_hand) * 10**9


def catalogue(conf: Path) -> dict[str, Entry]:
    """Everything that can be fetched, by name."""
    entries = [*_llms(conf), *_towers(conf), *_PUBLISHED, *_corpora(conf)]
    return {entry.name: entry for entry in entries}


def _llms(conf: Path) -> list[Entry]:
    found = []
    for name, values in _options(conf, "llm"):
        if values.get("checkpoint"):
            repo = values["checkpoint"]
            then = f"python train.py llm={name}"
            found.append(Entry(name=name, what="LLM", repo=repo, key="llm.checkpoint", then=then, **_known(repo)))
    return found


def _towers(conf: Path) -> list[Entry]:
    found = []
    for name, values in _options(conf, "vision"):
        then = f"python train.py vision={name}"
        if values.get("checkpoint"):
            repo = values["checkpoint"]
            found.append(Entry(name=name, what="tower", repo=repo, key="vision.checkpoint", then=then, **_known(repo)))
        elif values.get("open_clip_model") and values.get("open_clip_weights"):
            repo = open_clip_repo(values["open_clip_model"], values["open_clip_weights"])
            if repo:
                found.append(
                    Entry(
                        name=name,
                        what="tower",
                        repo=repo,
                        key=OPEN_CLIP,
                        weights=("open_clip_model.safetensors",),
                        otherwise=("open_clip_pytorch_model.bin",),
                        beside=("open_clip_config.json",),
                        then=then,
                        **_known(repo),
                    )
                )
    return found


def open_clip_repo(model: str, weights: str) -> str | None:
    """The repository that open_clip fetches these weights from; None where it is another place."""
    from open_clip.pretrained import get_pretrained_cfg

    return str(get_pretrained_cfg(model, weights).get("hf_hub") or "").rstrip("/") or None


def _corpora(conf: Path) -> list[Entry]:
    """Those of conf/data whose record file is on the hub; it goes where ``data.path`` says."""
    found = []
    for name, values in _options(conf, "data"):
        if name not in _CORPORA:
            continue
        record = PurePosixPath(values["path"])
        repo, archive, by_hand = _CORPORA[name]
        found.append(
            Entry(
                name=name,
                what="corpus",
                repo=repo,
                dataset=True,
                weights=(record.name, *([archive] if archive else [])),
                otherwise=(),
                beside=(),
                folder=str(record.parent),
                unpack=(archive, values["images"]) if archive else None,
                by_hand=by_hand,
                then=f"deepstack shards build data={name} data.root={{root}}",
                **_known(f"{repo}/{record.name}"),
            )
        )
    return found


def _options(conf: Path, group: str) -> list[tuple[str, dict[str, Any]]]:
    """The options of a group, by name."""
    files = sorted((conf / group).glob("*.yaml"))
    return [(file.stem, yaml.safe_load(file.read_text(encoding="utf-8")) or {}) for file in files]


def _known(repo: str) -> Mapping[str, Any]:
    size, licence, sure = _KNOWN.get(repo, (None, UNKNOWN, False))
    return {"size": None if size is None else round(size * 1e9), "licence": licence, "sure": sure}


def licence_of(repo: str) -> str:
    """The licence of what the hub keeps under ``repo``, as far as it is written down here."""
    return str(_known(repo)["licence"])


_LLAMA2, _APACHE = "Llama 2 Community", "Apache-2.0"
# Gigabytes to fetch, licence, whether the size was looked up.
_KNOWN: dict[str, tuple[float, str, bool]] = {
    "microsoft/Phi-3-mini-4k-instruct": (7.6, "MIT", False),
    "lmsys/vicuna-7b-v1.5": (13.5, _LLAMA2, False),
    "lmsys/vicuna-13b-v1.5": (26.0, _LLAMA2, False),
    "meta-llama/Meta-Llama-3-8B-Instruct": (16.1, "Llama 3 Community, gated", False),
    "Qwen/Qwen3-0.6B": (1.5, _APACHE, False),
    "Qwen/Qwen3-4B": (8.1, _APACHE, False),
    "Qwen/Qwen3-8B": (16.4, _APACHE, False),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (0.3, _APACHE, False),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": (3.4, _APACHE, False),
    "mistralai/Mistral-7B-Instruct-v0.3": (14.5, _APACHE, False),
    "google/gemma-3-1b-it": (2.0, "Gemma terms, gated", False),
    "timm/vit_large_patch14_clip_336.openai": (1.7, "MIT", False),
    "openai/clip-vit-large-patch14-336": (1.7, "MIT", False),
    "timm/ViT-SO400M-14-SigLIP-384": (3.5, _APACHE, False),
    "timm/ViT-SO400M-16-SigLIP2-384": (4.5, _APACHE, False),
    "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k": (0.3, _APACHE, False),
    "google/siglip-so400m-patch14-384": (3.5, _APACHE, False),
    "google/siglip2-so400m-patch16-384": (4.5, _APACHE, False),
    "facebook/dinov2-large": (1.2, _APACHE, False),
    "facebook/dinov2-with-registers-large": (1.2, _APACHE, False),
    "Qwen/Qwen3-VL-8B-Instruct": (17.5, _APACHE, False),
    "liuhaotian/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json": (27.54, "academic use; CC-3M's and BLIP's", True),
    "liuhaotian/LLaVA-Instruct-150K/llava_v1_5_mix665k.json": (1.0, "CC-BY-4.0 and OpenAI's terms", False),
    "Lin-Chen/ShareGPT4V/share-captioner_coco_lcs_sam_1246k_1107.json": (1.5, "CC-BY-NC-4.0", False),
    "Lin-Chen/ShareGPT4V/sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json": (1.2, "CC-BY-NC-4.0", False),
}

_PUBLISHED = [
    Entry(
        name=name,
        what="DeepStack",
        repo=f"menglc/{repo}",
        size=14_140_000_000,
        sure=True,
        licence=f"{_APACHE}; Vicuna's and CLIP's",
        then="deepstack convert {place} FOLDER",
    )
    for name, repo in (
        ("deepstack_l_vicuna_7b", "deepstack-l-vicuna-7b"),
        ("deepstack_l_hd_vicuna_7b", "deepstack-l-hd-vicuna-7b"),
    )
]

_COCO = ("coco/train2017/", "http://images.cocodataset.org/zips/train2017.zip, unpacked in coco/", 19)
_LCS = ("llava/llava_pretrain/images/", "deepstack fetch lcs558k", 55)
_SAM = (
    "sam/images/",
    "sa_000000.tar to sa_000050.tar of https://ai.meta.com/datasets/segment-anything-downloads/, all .jpg in one "
    "folder; for what you leave out say missing=skip",
    550,
)
_LLAVA_IMAGES = (
    _COCO,
    ("gqa/images/", "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip, unpacked in gqa/", 20),
    (
        "ocr_vqa/images/",
        "the script that https://github.com/haotian-liu/LLaVA#visual-instruction-tuning names, every file as .jpg; "
        "hundreds can no longer be had: say missing=skip",
        7,
    ),
    (
        "textvqa/train_images/",
        "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip, unpacked in textvqa/",
        7,
    ),
    ("vg/VG_100K/", "https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip, unpacked in vg/", 9),
    ("vg/VG_100K_2/", "https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip, unpacked in vg/", 5),
)
_WEB = (
    "share_textvqa/images/, web-celebrity/images/, web-landmark/images/, wikiart/images/",
    "where https://github.com/ShareGPT4Omni/ShareGPT4V/blob/master/docs/Data.md says",
    2,
)
# Repository, archive in it that is unpacked, what it does not have.
_CORPORA: dict[str, tuple[str, str | None, tuple[tuple[str, str, int], ...]]] = {
    "lcs558k": ("liuhaotian/LLaVA-Pretrain", "images.zip", ()),
    "llava665k": ("liuhaotian/LLaVA-Instruct-150K", None, _LLAVA_IMAGES),
    "sharegpt4v_pt": ("Lin-Chen/ShareGPT4V", None, (_COCO, _LCS, _SAM)),
    "sharegpt4v_sft": ("Lin-Chen/ShareGPT4V", None, (*_LLAVA_IMAGES, _LCS, _SAM, _WEB)),
}
