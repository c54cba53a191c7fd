"""The playground: one static page, which may run its own script and style, talk to this server, and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import Response

from peftune.serve.refusal import Refusal

_PAGE = Path(__file__).with_name("playground.html")
_BLOCK = {kind: re.compile(rf"<{kind}[^>]*>(.*?)</{kind}>", re.DOTALL) for kind in ("script", "style")}


class Page:
    """The page as it lies in the package, with a policy that names its blocks by their hashes."""

    def __init__(self, path: Path = _PAGE) -> None:
        self._text = path.read_bytes() if path.is_file() else None
        self._headers = {
            "Content-Security-Policy": _policy((self._text or b"").decode()),
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }

    def response(self) -> Response:
        """The page; Refusal 404 where the package has none."""
        if self._text is None:
            raise Refusal(404, "there is no page here; the API lies under /v1")
        return Response(self._text, headers=self._headers, media_type="text/html")


def _policy(page: str) -> str:
    allowed = {
        kind: " ".join(f"'sha256-{_hash(text)}'" for text in found.findall(page)) or "'none'"
        for kind, found in _BLOCK.items()
    }
    return (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
