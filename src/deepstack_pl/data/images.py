"""Bytes to pictures: what the bytes are, a look at the header before the decoder, and a plain sentence on failure.

EXIF rotation is not applied and of an animation the first frame is taken, as LLaVA and its descendants do.
"""

from io import BytesIO

from PIL import Image

from deepstack_pl.vision.views import as_rgb

MAX_PIXELS = 64_000_000  # refused from the header: a small file can unfold into gigabytes

_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"\xff\xd8\xff", "jpg"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
)
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


def decode_image(data: bytes, where: str) -> Image.Image:
    """The picture in RGB, transparency on white.

    Raises:
        ValueError: unreadable, or larger than `MAX_PIXELS`; says where, what was found and what to do.
    """
    try:
        image = Image.open(BytesIO(data))
        width, height = image.size
        if width * height <= MAX_PIXELS:
            image.load()
    except Image.DecompressionBombError as error:
        raise ValueError(f"{where}: {error} Scale it down, or leave it out.") from error
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        raise ValueError(
            f"{where}: cannot read this image: found {describe_bytes(data)} ({error}). "
            "Fetch it again, or leave its record out."
        ) from error
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{where}: an image of {width} x {height} pixels; at most {MAX_PIXELS:,} are decoded. "
            "Scale it down, or leave it out."
        )
    return as_rgb(image)
