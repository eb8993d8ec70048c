"""The page at ``/``: one file, and a policy that lets a browser run nothing but what stands in it."""

import base64
import hashlib
import re
from pathlib import Path

PAGE = (Path(__file__).parent / "pages" / "ask.html").read_text(encoding="utf-8")


def _hashes(tag: str) -> str:
    """What a policy says to let this page's own ``tag`` in: a digest of each."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.S)
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


POLICY = "; ".join(
    (
        "default-src 'none'",
        f"script-src {_hashes('script')}",
        f"style-src {_hashes('style')}",
        "img-src data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
