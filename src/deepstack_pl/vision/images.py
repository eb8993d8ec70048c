"""Bytes to pictures: what the bytes are, a look at the header before the decoder, and a plain sentence on failure.

JPEG is decoded by simplejpeg, everything else by Pillow: the pixels are Pillow's either way. EXIF rotation is not
applied and of an animation the first frame is taken, as LLaVA and its descendants do.
"""

import struct
import warnings
from io import BytesIO

import simplejpeg
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from deepstack_pl.batch import Reason, Refused
from deepstack_pl.vision.views import as_rgb

MAX_PIXELS = 64_000_000  # refused from the header: a small file can unfold into gigabytes
MAX_SIDE = 65_536  # one more than a JPEG can have; a line of millions of pixels takes resizing many seconds
_TILE, _BITS, _SAMPLES = (322, 323), 258, 277  # tags of a tif

_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"\xff\xd8\xff", "jpg"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
)
_PILLOW = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "webp": "WEBP"}
EXTENSIONS = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")


def sniff(data: bytes) -> str | None:
    """The extension that the bytes themselves call for; None for what is no picture. File names often lie."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((extension for signature, extension in _SIGNATURES if data.startswith(signature)), None)


def describe_bytes(data: bytes) -> str:
    """What was found where a picture should be."""
    kind = sniff(data)
    if not data:
        return "an empty file"
    if kind:
        return f"{len(data)} bytes of a {kind} image that is cut off or damaged"
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page instead of a picture (a download that failed)"
    return f"{len(data)} bytes that are no picture, starting with {data[:16]!r}"


def image_size(data: bytes, where: str = "image") -> tuple[int, int]:
    """Width and height in pixels, from the header alone.

    Raises:
        Refused: no picture, or more than `MAX_PIXELS`, or than `MAX_SIDE` on a side; says where, what was found and
            what to do.
    """
    if header := _jpeg_header(data):
        image, (width, height) = None, header[:2]
    else:
        image = _open(data, where)
        width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_large(where, f"{width} x {height}")
    if max(width, height) > MAX_SIDE:
        raise Refused(
            Reason.image,
            f"{where}: an image of {width} x {height} pixels; at most {MAX_SIDE:,} on a side are decoded. Cut it, or "
            "leave it out.",
        )
    if isinstance(image, TiffImageFile):
        _refuse_large_tiles(image, data, where)
    return width, height


def decode_image(data: bytes, where: str) -> Image.Image:
    """The picture in RGB, transparency on white.

    Raises:
        Refused: unreadable, cut off, of a mode without a range (32 bits), or larger than `MAX_PIXELS`, which is found
            before any decoder runs; says where, what was found and what to do.
    """
    image_size(data, where)
    image = _decode_jpeg(data, where) or _open(data, where)
    try:
        image.load()
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        raise _unreadable(data, where, error) from error
    if image.mode in ("I", "F"):
        raise Refused(
            Reason.image,
            f"{where}: an image of 32 bits a pixel (mode {image.mode}), which say neither black nor white. "
            "Save it with 8 or 16 bits, or leave its record out.",
        )
    return as_rgb(image)


def _open(data: bytes, where: str) -> Image.Image:
    """The header as Pillow reads it; only the decoder that the bytes call for is tried."""
    kind = sniff(data)
    if kind is None:
        raise _unreadable(data, where)
    try:
        with warnings.catch_warnings():  # our own bound is below the one that Pillow warns of
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(BytesIO(data), formats=(_PILLOW[kind],))
    except Image.DecompressionBombError as error:  # a bound of Pillow's own, above ours
        raise _too_large(where, f"more than {MAX_PIXELS:,}") from error
    except UnidentifiedImageError as error:  # its text is the address of an object in memory
        raise _unreadable(data, where) from error
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        raise _unreadable(data, where, error) from error


def _refuse_large_tiles(image: TiffImageFile, data: bytes, where: str) -> None:
    """A tile is decoded as a whole, however small the picture is that is cut from it; strips end where it ends."""
    tags = image.tag_v2
    sides = [tags[tag] for tag in _TILE if tag in tags]
    # Of two tags of one number Pillow reads the last, and libtiff, which decodes, the first.
    order = "<" if data.startswith(b"II") else ">"
    try:
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        numbers = {struct.unpack_from(f"{order}H", data, start + 2 + 12 * place) for place in range(count)}
    except struct.error as error:
        raise _unreadable(data, where, error) from error
    if len(numbers) < count or not all(isinstance(side, int) for side in sides):
        raise _unreadable(data, where)
    bits = tags.get(_BITS, (1,))
    pixel = max(4, max(bits) * max(len(bits), tags.get(_SAMPLES, 1)) // 8)
    if len(sides) == 2 and sides[0] * sides[1] * pixel > 4 * MAX_PIXELS:
        raise Refused(
            Reason.image,
            f"{where}: an image in tiles of {sides[0]} x {sides[1]} pixels, {pixel} bytes each; at most "
            f"{4 * MAX_PIXELS:,} bytes of a tile are decoded. Save it without tiles, or leave it out.",
        )


def _jpeg_header(data: bytes) -> tuple[int, int, str] | None:
    """Width, height and colours of a JPEG; None for what is none, and for one that TurboJPEG does not know."""
    if sniff(data) != "jpg":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # Pillow knows more kinds; what it cannot read either is refused there
        return None
    return int(width), int(height), str(colours)


def _decode_jpeg(data: bytes, where: str) -> Image.Image | None:
    """The pixels of a JPEG, decoded strictly: Pillow hands out what a cut file has, and grey for the rest. None where
    Pillow is to decode: four colours, whose rounding differs.

    Bytes after the end, and zeros before the end marker, lose nothing. Other bytes too many mean that a scan is damaged
    (one in two such pictures is wrong by a third): refused.
    """
    header = _jpeg_header(data)
    if header is None:
        return None
    inks = header[2] in ("CMYK", "YCCK")
    colours = "CMYK" if inks else "RGB"
    try:
        try:
            pixels = simplejpeg.decode_jpeg(data, colours)
        except ValueError as error:
            if "extraneous bytes before marker 0xd9" not in str(error):
                raise
            pixels = simplejpeg.decode_jpeg(_without_padding(data), colours)
    except ValueError as error:
        raise _unreadable(data, where, error) from error
    return None if inks else Image.fromarray(pixels)


def _without_padding(data: bytes) -> bytes:
    """Without the zeros before the end marker. A scan of which zeros took a part is cut off without them."""
    end = data.rfind(b"\xff\xd9")
    scan = data[:end].rstrip(b"\0")
    return scan + (b"\0" if scan.endswith(b"\xff") else b"") + data[end:]  # FF 00 is a byte of the scan


def _unreadable(data: bytes, where: str, error: Exception | None = None) -> Refused:
    found = describe_bytes(data) + (f" ({error})" if error else "")
    return Refused(
        Reason.image,
        f"{where}: cannot read this image: found {found}. Fetch it again, or leave its record out.",
    )


def _too_large(where: str, size: str) -> Refused:
    return Refused(
        Reason.image,
        f"{where}: an image of {size} pixels; at most {MAX_PIXELS:,} are decoded. Scale it down, or leave it out.",
    )
