"""The playground: a few static files, which may load one another, talk to this server, and nothing else."""

from __future__ import annotations

from pathlib import Path

from fastapi import Response

from peftune.serve.openai.errors import ApiError

FOLDER = Path(__file__).parents[1] / "playground"
PREFIX = "/playground/"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Page:
    """The files as they lie in the package, read once; a name is looked up and never becomes a path."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in _TYPES}

    def response(self, name: str = "index.html") -> Response:
        """One of the files; ApiError 404 for any other name."""
        content = self._files.get(name)
        if content is None:
            raise ApiError(404, "there is no such path here")
        return Response(content, headers=_HEADERS, media_type=_TYPES[Path(name).suffix])
