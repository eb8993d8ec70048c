"""Small replicas of the published corpora, in their layout, with every oddity that they or their downloads have.

    python tests/data/replicas.py llava665k FOLDER [--clean]

writes one; ``--clean`` leaves out the records that cannot be taken.
"""

import argparse
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from deepstack_pl.batch import Reason

TEXT = "text"
JSON = {
    "lcs558k": "llava/llava_pretrain/blip_laion_cc_sbu_558k.json",
    "sharegpt4v_pt": "sharegpt4v/share-captioner_coco_lcs_sam_1246k_1107.json",
    "sharegpt4v_sft": "sharegpt4v/sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json",
    "llava665k": "llava/llava_v1_5_mix665k.json",
}
IMAGES = {"lcs558k": "llava/llava_pretrain/images"}
_MIX = ("coco/train2017/{:012d}.jpg", "gqa/images/{}.jpg", "ocr_vqa/images/{:010d}.jpg")
_MIX += ("textvqa/train_images/{:016x}.jpg", "vg/VG_100K/{}.jpg", "vg/VG_100K_2/{}.jpg")
_SHARE = ("coco/train2017/{:012d}.jpg", "llava/llava_pretrain/images/00453/{:09d}.jpg", "sam/images/sa_{}.jpg")
_MORE = tuple(f"{name}/images/{{}}.jpg" for name in ("share_textvqa", "web-celebrity", "web-landmark", "wikiart"))
PATHS = {
    "lcs558k": ("00453/{:09d}.jpg", "00012/{:09d}.jpg"),
    "sharegpt4v_pt": _SHARE,
    "sharegpt4v_sft": tuple(dict.fromkeys((*_MIX, *_SHARE, *_MORE))),
    "llava665k": _MIX,
}
WITH_TEXT = ("sharegpt4v_sft", "llava665k")
CLEAN = 30  # plain records of each


class Replica(NamedTuple):
    """Where it lies, its records, and which rows cannot be taken, why."""

    name: str
    root: Path
    json: Path
    images: Path
    records: list[dict[str, Any]]
    refused: dict[int, Reason]

    def source(self, row: int) -> str:
        """By the corpus's own layout."""
        image = self.records[row].get("image")
        image = image[0] if isinstance(image, list) else image
        if not image:
            return TEXT
        folder = image.removeprefix("./").split("/")[0]
        return self.name if folder.isdigit() else folder


def write_replica(name: str, root: Path, clean: bool = False) -> Replica:
    """The corpus ``name`` under ``root``; ``clean``: without the records that cannot be taken."""
    images, path = root / IMAGES.get(name, ""), root / JSON[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    refused: dict[int, Reason] = {}
    for record, data, reason in (*_plain(name), *_odd(name)):
        if clean and reason is not None:
            continue
        if reason is not None:
            refused[len(records)] = reason
        records.append(record)
        if data is not None:
            file = images / record["image"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
    text = json.dumps(records)
    path.write_text(text, encoding="utf-8" if clean else "utf-8-sig")  # with a byte order mark
    return Replica(name, root, path, images, records, refused)


Made = tuple[dict[str, Any], bytes | None, Reason | None]


def _plain(name: str) -> Iterator[Made]:
    paths = PATHS[name]
    for number in range(CLEAN):
        image = paths[number % len(paths)].format(4539000 + number)
        size = ((48, 32), (32, 48), (40, 40))[number % 3]
        ask = ("<image>\nWhat is this?", "Say what you see.\n<image>")[number % 2]
        more = (
            () if name in ("lcs558k", "sharegpt4v_pt") else ("Is it large?", f"It has {number} parts.") * (number % 3)
        )
        record = said(ask, f"Picture {number}, {size[0]} wide.", *more, image=image)
        yield record, jpeg(picture(number, *size)), None
        if name in WITH_TEXT and number % 5 == 0:
            text = said(f"Hello {number}?", "Hi there.", id=f"wgByO4Y_{number}", model="")
            yield text, None, None


def _odd(name: str) -> Iterator[Made]:
    """Every edge case; the second of a pair is the image's bytes, the third why it cannot be taken."""
    paths, odd = PATHS[name], Reason.conversation
    first = paths[0].format(4539000)

    def at(number: int) -> str:
        return paths[number % len(paths)].format(9990000 + number)

    # placeholders and turns
    yield said("<image>\nTwice <image> in one turn?", "Once.", image=at(0)), jpeg(picture(0)), None
    yield said("Hello", "Hi", "And <image> now?", "A picture.", image=at(1)), jpeg(picture(1)), None
    yield said("<image>\nHere", "a", "and <image> here", "b", image=at(2)), jpeg(picture(2)), odd
    yield said("No placeholder", "a", image=at(3)), jpeg(picture(3)), odd
    yield said("<image>", "An answer with <image>", image=at(4)), jpeg(picture(4)), odd
    yield said("What does <image> mean in HTML?", "A tag.", model=""), None, odd
    welcome = said("<image>\nAnd this?", "A picture.", image=at(5))
    welcome["conversations"].insert(0, {"from": "gpt", "value": "Welcome."})
    yield welcome, jpeg(picture(5)), None
    yield said("<image>\nOdd", "a", "number of turns", image=at(6)), jpeg(picture(6)), None
    yield said("<image>\nNothing but a question", image=at(6)), jpeg(picture(6)), odd
    yield said("<image>", "", image=at(7)), jpeg(picture(7)), odd
    yield {"id": "8", "image": at(8), "conversations": []}, jpeg(picture(8)), odd
    yield {"id": "9", "image": at(9)}, jpeg(picture(9)), odd
    yield said("<image>\nWho speaks?", "a", image=at(10), speakers=("system", "gpt")), jpeg(picture(10)), odd
    yield said("<image>" + "What now?", *(("So?", "Yes.") * 100)[1:], image=at(11)), jpeg(picture(11)), None
    # names
    yield said("<image>\nAgain?", "The same image.", image=first, id="0"), None, None
    yield said("<image>\nAgain, by another name?", "The same.", image=f"./{first}"), None, None
    yield said("<image>", "Not downloaded", image=at(12)), None, Reason.missing
    yield said("<image>", "A way out", image="../secret.jpg"), None, odd
    yield said("<image>", "Another", image="/etc/hostname"), None, odd
    yield said("<image>", "No name", image=7), None, odd
    yield said("<image>", "Half a name", image="a\ud800.jpg"), None, odd
    # pictures
    pictures: dict[str, tuple[bytes, Reason | None]] = {
        "png": (encoded(picture(13), "PNG"), None),
        "gif": (encoded(picture(14), "GIF"), None),
        "webp": (encoded(picture(15), "WEBP"), None),
        "CMYK": (jpeg(picture(16).convert("CMYK")), None),
        "grey": (jpeg(picture(17).convert("L")), None),
        "RGBA": (encoded(picture(18).convert("RGBA"), "PNG"), None),
        "palette": (encoded(picture(19).convert("P"), "PNG"), None),
        "16 bits": (encoded(picture(20).convert("I;16"), "PNG"), None),
        "animated": (animated(), None),
        "1 x 1": (jpeg(picture(21, 1, 1)), None),
        "1 x 5000": (jpeg(picture(22, 1, 5000)), None),
        "turned": (turned(), None),
        "30,000 x 30,000": (huge(), Reason.image),
        "cut off": (jpeg(picture(23, 64, 64))[:700], Reason.image),
        "empty": (b"", Reason.image),
        "a web page": (b"<!DOCTYPE html><title>404</title>", Reason.image),
    }
    for number, (what, (data, reason)) in enumerate(pictures.items(), start=20):
        yield said("<image>\nWhat kind?", f"It is {what}.", image=at(number)), data, reason
    # text
    yield said("<image>\nNUL \0 in text?", "Yes \0.", image=at(50)), jpeg(picture(50)), None
    yield said("<image>\nمن اليمين", "אמת \u202eabc \U0001f600", image=at(51)), jpeg(picture(51)), None
    yield said("<image>\nHalf a character \ud83d", "a", image=at(52)), jpeg(picture(52)), odd
    yield said("<image>", "NaN", image=at(53), score=float("nan")), jpeg(picture(53)), odd
    unsorted = said("<image>\nUnsorted keys?", "Yes.", image=at(54), zebra=1)
    yield dict(reversed(unsorted.items())), jpeg(picture(54)), None


def said(*turns: str, speakers: tuple[str, str] = ("human", "gpt"), **more: Any) -> dict[str, Any]:
    """A record whose turns alternate."""
    conversation = [{"from": speakers[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"id": "000000012", **more, "conversations": conversation}


def picture(number: int, width: int = 32, height: int = 32) -> Image.Image:
    """A gradient of its own colour."""
    ramp = Image.linear_gradient("L").resize((width, height))
    flat = [Image.new("L", (width, height), number * step % 256) for step in (37, 91)]
    return Image.merge("RGB", [ramp, *flat])


def encoded(image: Image.Image, kind: str, **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def jpeg(image: Image.Image) -> bytes:
    return encoded(image, "JPEG")


def animated() -> bytes:
    return encoded(picture(30), "GIF", save_all=True, append_images=[picture(31), picture(32)])


def turned() -> bytes:
    """Says in its EXIF that it is to be turned, which no reader of LLaVA's does."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(33, 48, 32), "JPEG", exif=exif)


def huge() -> bytes:
    """A PNG of 30,000 x 30,000 pixels by its header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def main(tell: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description="Writes a small replica of a published corpus.")
    parser.add_argument("name", choices=JSON)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clean", action="store_true", help="only records that can be taken")
    args = parser.parse_args()
    replica = write_replica(args.name, args.folder, args.clean)
    tell(f"{len(replica.records)} records in {replica.json}, {len(replica.refused)} of them cannot be taken")


if __name__ == "__main__":
    main()
