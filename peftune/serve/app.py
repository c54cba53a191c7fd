"""The ASGI application: its routes."""

from __future__ import annotations

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from peftune.serve.http.middleware import GatewayMiddleware, on_http_exception
from peftune.serve.http.static import PREFIX, playground_files
from peftune.serve.openai import chat, completions, models, tokenize
from peftune.serve.service import Service, service_of
from peftune.version import __version__


def build_app(service: Service) -> Starlette:
    """The application of one server. It sends no CORS headers: pages of other origins read nothing."""
    files = playground_files()
    routes = [
        Route(completions.PATH, completions.create_completion, methods=["POST"]),
        Route(chat.PATH, chat.create_chat_completion, methods=["POST"]),
        Route("/v1/models", models.list_models),
        Route("/v1/models/{model:path}", models.show_model),
        Route("/v1/load_lora_adapter", models.load_adapter, methods=["POST"]),
        Route("/v1/unload_lora_adapter", models.unload_adapter, methods=["POST"]),
        Route("/tokenize", tokenize.tokenize, methods=["POST"]),
        Route("/detokenize", tokenize.detokenize, methods=["POST"]),
        Route("/health", _health),
        Route("/ping", _health, methods=["GET", "POST"]),
        Route("/version", _version),
        Route("/metrics", _metrics),
        Route("/", files["index.html"], methods=["GET"]),
        *(Route(PREFIX + name, response, methods=["GET"]) for name, response in files.items()),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(GatewayMiddleware, service, frozenset(route.path for route in routes))],
        exception_handlers={HTTPException: on_http_exception},
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


async def _health(http: Request) -> Response:
    service_of(http).refuse_when_down()
    return JSONResponse({"status": "ok"})


async def _version(http: Request) -> Response:
    return JSONResponse({"version": __version__})


async def _metrics(http: Request) -> Response:
    return Response(generate_latest(service_of(http).metrics.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)
