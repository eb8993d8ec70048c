"""Pictures of requests: bytes in a data: URI, or a file below one folder. Nothing is ever fetched."""

import base64
import binascii
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from deepstack_pl.vision.images import MAX_PIXELS, decode_image, image_size


def bytes_of(url: str, where: str, *, root: Path | None, most: int) -> bytes:
    """What ``url`` holds: of ``data:``, or of ``file:`` below ``root``, which may have at most ``most`` bytes.

    Raises:
        ValueError: it is neither, or outside ``root``, or no file that can be read.
    """
    scheme = url.split(":", 1)[0].lower() if ":" in url else ""
    if scheme == "data":
        return _data(url, where)
    if scheme == "file":
        return _file(url, where, root, most)
    raise ValueError(
        f"{where}: the address {_short(url)} is not followed: this server never makes requests of its own. Send the "
        "picture's bytes, as data:image/png;base64,..."
    )


def decoded(pictures: list[tuple[str, bytes]]) -> list[Image.Image]:
    """The pictures, (where, bytes) each, once all headers together were found to unfold to no more than one may.

    Raises:
        Refused: one cannot be read, or is too large.
        ValueError: together they are.
    """
    sizes = [image_size(data, where) for where, data in pictures]
    total = sum(width * height for width, height in sizes)
    if total > MAX_PIXELS:
        raise ValueError(
            f"{len(pictures)} pictures of {total:,} pixels together; at most {MAX_PIXELS:,} are decoded for one "
            "request. Scale them down, or send fewer."
        )
    return [decode_image(data, where) for where, data in pictures]


def _data(url: str, where: str) -> bytes:
    head, comma, body = url.partition(",")
    kind, *parameters = head[len("data:") :].lower().split(";")
    if not comma or not kind.startswith("image/") or parameters[-1:] != ["base64"]:
        raise ValueError(f"{where}: {_short(url)} must begin as data:image/png;base64, does (png: whatever it is).")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(
            f"{where}: what follows the comma of {_short(head)} is not base64: {error}. Encode the file's bytes."
        ) from error


def _file(url: str, where: str, root: Path | None, most: int) -> bytes:
    if root is None:
        raise ValueError(
            f"{where}: {_short(url)} is a file of the server's machine, and none may be read. Start the server with "
            "--image-root FOLDER, or send the picture's bytes as data:image/png;base64,..."
        )
    parts = urlsplit(url)
    path = unquote(parts.path)
    outside = ValueError(f"{where}: {_short(url)} is not in the folder that --image-root names. Files there are read.")
    if parts.netloc not in ("", "localhost") or "\0" in path:
        raise outside
    try:
        file = Path(path).resolve()  # through every symbolic link
    except (OSError, RuntimeError):  # a loop of links
        raise outside from None
    if not file.is_relative_to(root.resolve()):
        raise outside  # nothing is said of what lies there, or does not
    try:
        if not file.is_file():
            raise ValueError(f"{where}: {_short(url)}: there is no such file.")
        with file.open("rb") as opened:
            data = opened.read(most + 1)
    except OSError:  # its text is the path behind the links
        raise ValueError(f"{where}: {_short(url)} cannot be read.") from None
    if len(data) > most:
        raise ValueError(
            f"{where}: {_short(url)} is larger than the {most:,} bytes that --max-body-mb leaves for it. Send smaller "
            "pictures, or fewer."
        )
    return data


def _short(url: str) -> str:
    return repr(url if len(url) <= 80 else f"{url[:77]}...")
