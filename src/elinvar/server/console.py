"""The console: the static files of the package's folder `console`, at / and /console/.

Owns how they are served: from memory, unchanged while the process lives, under a policy by which a
page runs no program but these and talks to no server but this one.
"""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from elinvar.base.digest import blake2b
from elinvar.server.errors import ApiError

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'self'",
    "frame-ancestors": "'none'",
    # No text becomes a program or an element, whatever a bug does with a model's words.
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
_HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Kept by browsers, but asked for again: a new version is seen at once.
    "Cache-Control": "no-cache",
}


class Console:
    def __init__(self) -> None:
        self._files = {
            one.name: one.read_bytes()
            for one in files("elinvar.server").joinpath("console").iterdir()
            if one.name.rpartition(".")[2] in _TYPES
        }

    def routes(self) -> list[Route]:
        return [
            Route("/", self.console, methods=["GET"]),
            Route("/console/{name}", self.console, methods=["GET"]),
        ]

    async def console(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        content = self._files.get(name)
        if content is None:
            raise ApiError(404, f"The console has no file '{name[:200]}'.", None, "unknown_url")
        tag = f'"{blake2b(content, digest_size=12).hexdigest()}"'
        headers = {**_HEADERS, "ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=_TYPES[name.rpartition(".")[2]])
