"""Bytes to pixels: what is stored decodes to what was stored, and what is damaged is refused in a sentence.

`pictures/` was written by Pillow 12.3.0; the digests are of its pixels, simplejpeg's being the same.
"""

import pickle
import struct
import time
import warnings
import zlib
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL
import pytest
import simplejpeg
from PIL import Image, ImageSequence, features

from deepstack_pl.batch import Reason, Refused
from deepstack_pl.vision import images
from deepstack_pl.vision.images import decode_image, image_size, sniff

PICTURES = Path(__file__).parent / "pictures"
STORED = {
    "alpha.png": ((40, 24), "6298aa1436368e00"),
    "animated.gif": ((40, 24), "69331afaf666625d"),
    "animated.webp": ((40, 24), "b69f7d2ffbcc18e4"),
    "bits.png": ((40, 24), "2feb78be2e0cdef9"),
    "clear_palette.png": ((40, 24), "8a5d4ec57db3c3c9"),
    "cmyk.jpg": ((40, 24), "8f2924118a617d5d"),
    "colour.jpg": ((40, 24), "8fbf1d51b96e9406"),
    "deep_colour.png": ((40, 24), "b3e74a9a27ef18e6"),
    "deep_grey.png": ((40, 24), "2bb7c81dabe19b06"),
    "grey.jpg": ((40, 24), "61840e784d23f96b"),
    "lossy.webp": ((40, 24), "88dc60060bd58f23"),
    "one.png": ((1, 1), "039058c6f2c0cb49"),
    "packed.tif": ((40, 24), "d68544c383fd79d6"),
    "plain.bmp": ((40, 24), "d68544c383fd79d6"),
    "progressive.jpg": ((40, 24), "8f1ec87e5897bd29"),
    "rgb.jpg": ((40, 24), "c6539fa9e7f0b265"),
    "sliver.png": ((1, 5000), "56f0ad0b345ab617"),
    "turned.jpg": ((40, 24), "8fbf1d51b96e9406"),
    "two_in_one.jpg": ((40, 24), "8fbf1d51b96e9406"),
}


def written(name: str) -> bytes:
    return (PICTURES / name).read_bytes()


def photo(width: int = 640, height: int = 480) -> Image.Image:
    shapes = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(shapes).resize((width, height), Image.Resampling.BICUBIC)


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode != "CMYK":
        return image.convert(mode)
    return Image.merge(mode, (*image.convert(mode).split()[:3], image.convert("L")))  # Pillow alone gives no black


def jpeg(image: Image.Image, **how: object) -> bytes:
    file = BytesIO()
    image.save(file, "JPEG", **how)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
    )


def tif(side: int, tile: int | None = None, *, twice: bool = False) -> bytes:
    """A black square of this side, deflated; in one tile of its own size, or in one strip that says a million rows."""
    packed = zlib.compressobj(9)
    rows = range(tile or side)
    pixels = b"".join([*(packed.compress(bytes(3 * len(rows))) for _ in rows), packed.flush()])
    tags = {256: [side], 257: [side], 258: [8] * 3, 259: [8], 262: [2], 277: [3]}
    where, length = (324, 325) if tile else (273, 279)
    tags |= {322: [tile], 323: [tile]} if tile else {278: [1_000_000]}
    entries = [*(tags | {where: [0], length: [len(pixels)]}).items()]
    entries += [(number, [16]) for number in (322, 323) if twice]
    after = 8 + 2 + 12 * len(entries) + 4
    lines = [
        struct.pack(
            "<HHII", number, 4, len(values), after if len(values) > 1 else after + 12 if number == where else values[0]
        )
        for number, values in sorted(entries, key=lambda entry: entry[0])
    ]
    head = b"II*\0" + struct.pack("<IH", 8, len(lines)) + b"".join(lines) + bytes(4)
    return head + struct.pack("<III", 8, 8, 8) + pixels


def refusal(data: bytes) -> str:
    with pytest.raises(Refused) as caught:
        decode_image(data, "k")
    assert caught.value.reason is Reason.image
    assert caught.value.sentence.startswith("k: ")
    return caught.value.sentence


def test_every_kind_of_picture_decodes_to_the_stored_pixels() -> None:
    found = {}
    for file in sorted(PICTURES.iterdir()):
        image = decode_image(file.read_bytes(), file.name)
        assert image.mode == "RGB"
        assert image_size(file.read_bytes()) == image.size
        found[file.name] = (image.size, sha256(image.tobytes()).hexdigest()[:16])
    versions = f"Pillow {PIL.__version__} (libjpeg-turbo {features.version('libjpeg_turbo')}), "
    assert found == STORED, versions + f"simplejpeg {simplejpeg.__version__}"


def test_the_stored_pictures_mean_what_their_names_say() -> None:
    plain = decode_image(written("plain.bmp"), "k")
    for name in ("animated.gif", "animated.webp"):
        frames = [frame.convert("RGB").tobytes() for frame in ImageSequence.Iterator(Image.open(PICTURES / name))]
        assert decode_image(written(name), "k").tobytes() == frames[0] != frames[1]
    assert decode_image(written("turned.jpg"), "k").tobytes() == decode_image(written("colour.jpg"), "k").tobytes()
    grey = np.asarray(decode_image(written("grey.jpg"), "k"))
    assert (grey == grey[..., :1]).all()
    assert decode_image(written("packed.tif"), "k").tobytes() == plain.tobytes()
    clear = np.asarray(decode_image(written("alpha.png"), "k"))
    assert (clear[:, 0] == 255).all()  # transparent is white
    assert np.array_equal(clear[:, -1], np.asarray(plain)[:, -1])
    deep = np.asarray(Image.open(PICTURES / "deep_grey.png"))
    assert np.array_equal(np.asarray(decode_image(written("deep_grey.png"), "k"))[..., 0], deep >> 8)
    inks = np.asarray(decode_image(written("cmyk.jpg"), "k")).astype(int)
    assert np.abs(inks - np.asarray(plain) * (191 / 255)).mean() < 5  # its black is 64 everywhere; and not inverted


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("size", [(640, 480), (17, 33), (1, 1), (1, 20_000), (333, 7)], ids=str)
def test_a_jpeg_decodes_to_pillows_pixels_bit_for_bit(
    size: tuple[int, int], subsampling: int, progressive: bool
) -> None:
    for mode in ("RGB", "L", "CMYK"):
        for quality in (30, 90):
            own = {"subsampling": subsampling} if mode == "RGB" else {}
            data = jpeg(as_mode(photo(*size), mode), quality=quality, progressive=progressive, **own)
            expected = Image.open(BytesIO(data)).convert("RGB")
            assert decode_image(data, "k").tobytes() == expected.tobytes()


def test_simplejpeg_decodes_jpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    data = jpeg(photo())
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: pytest.fail("Pillow was asked"))
    assert decode_image(data, "k").size == image_size(data) == (640, 480)


END = b"\xff\xd9"


@pytest.mark.parametrize("finished", [False, True], ids=["cut", "cut_and_closed"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_is_cut_off_is_refused_and_never_half_grey(mode: str, progressive: bool, finished: bool) -> None:
    """Pillow hands out what is there where somebody closed the file with an end marker."""
    data = jpeg(as_mode(photo(), mode), progressive=progressive)
    start = data.index(b"\xff\xda") + 20
    for cut in range(start, len(data) - 20, max(1, len(data) // 23)):
        assert "bytes of a jpg image that is cut off or damaged" in refusal(data[:cut] + END * finished)


OTHERS = {"alpha.png": 1, "deep_colour.png": 1, "plain.bmp": 1, "packed.tif": 0.9, "lossy.webp": 1, "animated.gif": 0.5}


@pytest.mark.parametrize(("name", "share"), OTHERS.items())
def test_any_other_picture_that_is_cut_off_is_refused(name: str, share: float) -> None:
    """The pixels lie within ``share`` of the bytes: a gif has a second frame, a tif its tags, behind them."""
    data = written(name)
    for cut in range(1, int(len(data) * share) - 20, 17):
        assert "cannot read this image: found" in refusal(data[:cut])


def test_a_jpeg_with_bytes_too_many_is_whole_and_decodes_as_pillow_does() -> None:
    data = jpeg(photo(64, 48))
    for more in (data + b"junk", data[:-2] + b"\0" * 10 + END):
        assert decode_image(more, "k").tobytes() == Image.open(BytesIO(data)).tobytes()


def test_names_lie_and_bytes_do_not() -> None:
    found = {file.name: sniff(file.read_bytes()) for file in PICTURES.iterdir()}
    assert found == {name: name.rsplit(".", 1)[1] for name in found}
    animated = decode_image(written("animated.gif"), "k").tobytes()
    assert decode_image(written("animated.gif"), "photo.jpg").tobytes() == animated
    with pytest.raises(Refused, match=r"^photo\.jpg: cannot read this image: found a web page instead of a picture"):
        decode_image(b"<!DOCTYPE html><html>404</html>", "photo.jpg")


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1)], ids=str)
def test_a_sliver_of_20000_pixels_is_decoded_whole(size: tuple[int, int]) -> None:
    file = BytesIO()
    photo(*size).save(file, "PNG")
    assert decode_image(file.getvalue(), "k").tobytes() == photo(*size).tobytes()


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>", b"GARBAGE", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF", b"P6 1 1 255\nabc"],
)
def test_what_is_no_picture_is_refused_by_size_and_by_decoding(data: bytes) -> None:
    assert refusal(data).endswith("Fetch it again, or leave its record out.")
    assert "object at 0x" not in refusal(data)
    with pytest.raises(Refused, match=r"^image: cannot read this image: found "):
        image_size(data)


def test_a_huge_header_is_refused_in_milliseconds_and_without_memory() -> None:
    whole = jpeg(photo())
    place = whole.index(b"\xff\xc0") + 5
    huge_jpeg = whole[:place] + struct.pack(">HH", 40_000, 40_000) + whole[place + 4 :]
    for data in (png_header(40_000, 40_000), huge_jpeg, png_header(8001, 8000)):  # the first: past Pillow's bound, too
        start = time.perf_counter()
        said = refusal(data)
        assert time.perf_counter() - start < 0.1
        assert "pixels; at most 64,000,000 are decoded. Scale it down, or leave it out." in said
        with pytest.raises(Refused, match="at most 64,000,000"):
            image_size(data)


def test_a_tif_is_not_decoded_in_tiles_that_are_larger_than_any_picture() -> None:
    """A tile of 36,000 x 36,000 zeros is 5.6 MB in the file, and 3.9 GB in memory, for a picture of 16 x 16."""
    assert decode_image(tif(16, 512), "k").size == (16, 16)
    assert decode_image(tif(16), "k").size == (16, 16)
    large = tif(16, 9_000)
    said = refusal(large)
    assert "an image in tiles of 9000 x 9000 pixels, 4 bytes each; at most 256,000,000 bytes of a tile" in said
    with pytest.raises(Refused, match="tiles of 9000 x 9000"):
        image_size(large)


def test_a_tif_that_says_its_tiles_size_twice_is_refused() -> None:
    """Pillow would read 16, the last, and libtiff decode the first."""
    assert "cannot read this image" in refusal(tif(16, 9_000, twice=True))


def test_a_tif_that_ends_within_its_tags_is_refused() -> None:
    data = tif(16, 512)
    for cut in range(9, len(data) - 1, 5):
        assert "cut off or damaged" in refusal(data[:cut])


def test_a_side_has_an_end_and_long_pictures_are_read() -> None:
    for size in ((64_000_000, 1), (1, 65_537)):
        start = time.perf_counter()
        said = refusal(png_header(*size))
        assert time.perf_counter() - start < 0.1
        assert f"an image of {size[0]} x {size[1]} pixels; at most 65,536 on a side are decoded. Cut it" in said
    assert image_size(png_header(65_536, 1)) == (65_536, 1)
    file = BytesIO()
    Image.new("RGB", (1, 20_000), "red").save(file, "PNG")
    assert decode_image(file.getvalue(), "k").size == (1, 20_000)


def test_no_decoder_runs_on_too_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 959)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *args: pytest.fail("simplejpeg decoded"))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("Pillow decoded"))
    for name in ("colour.jpg", "cmyk.jpg", "alpha.png", "animated.gif", "lossy.webp"):
        assert "an image of 40 x 24 pixels; at most 959 are decoded" in refusal(written(name))


def test_thirty_two_bits_without_a_range_are_refused_and_not_clipped() -> None:
    for mode in ("I", "F"):
        file = BytesIO()
        Image.new(mode, (4, 4), 70000).save(file, "TIFF")
        assert f"32 bits a pixel (mode {mode})" in refusal(file.getvalue())


def test_a_refusal_travels_between_processes() -> None:
    with pytest.raises(Refused) as caught:
        decode_image(b"", "k")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.reason, again.sentence) == (Reason.image, caught.value.sentence)


def test_a_jpeg_whose_scan_was_damaged_is_refused_though_bytes_are_left_over() -> None:
    """Pillow hands out a picture of which a third is wrong."""
    data, draw = jpeg(photo(320, 240)), np.random.default_rng(0)
    found = set()
    for _ in range(60):
        at, more = int(draw.integers(1000, len(data) - 1000)), draw.bytes(int(draw.integers(1, 900)))
        damaged = data[:at] + more + data[at:]
        try:
            simplejpeg.decode_jpeg(damaged, "RGB")
        except ValueError as error:
            found.add("extraneous" in str(error))
            assert "cut off or damaged" in refusal(damaged)
    assert found == {True, False}
    for at in range(1000, len(data) - 1000, 999):
        assert "cut off or damaged" in refusal(data[:at] + bytes(len(data) - at) + END)  # a hole in a download


def test_nothing_but_our_own_sentence_is_said_of_too_many_pixels() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "an image of 12000 x 8000 pixels" in refusal(
            png_header(12_000, 8_000)
        )  # Pillow warns from 89 million on
