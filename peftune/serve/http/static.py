"""The playground: a few static files, which may load each other, call this server, and nothing else."""

from __future__ import annotations

from pathlib import Path

from starlette.responses import Response

FOLDER = Path(__file__).parents[1] / "playground"
PREFIX = "/playground/"
# Not from `mimetypes`, as Starlette's StaticFiles does: there the type of .js depends on the operating system.
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
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


def playground_files() -> dict[str, Response]:
    """The response for each file of the package's folder, by name; no path of a request is ever opened."""
    return {
        path.name: Response(path.read_bytes(), headers=_HEADERS, media_type=_MEDIA_TYPES[path.suffix])
        for path in FOLDER.iterdir()
        if path.suffix in _MEDIA_TYPES
    }
