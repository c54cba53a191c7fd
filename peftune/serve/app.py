"""The application: which path leads where."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from peftune.serve import metrics
from peftune.serve.http.middleware import Guard, on_http_exception
from peftune.serve.http.static import PREFIX, Page
from peftune.serve.openai import chat, completions, models
from peftune.serve.openai.errors import draining
from peftune.serve.service import Service, service_of


def build_app(service: Service) -> FastAPI:
    """FastAPI without its own pages (they load scripts from elsewhere) and without CORS: other origins get nothing."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.service = service
    app.state.page = Page()
    app.add_exception_handler(HTTPException, on_http_exception)  # type: ignore[arg-type]
    app.add_middleware(Guard, service=service)
    app.add_api_route(completions.PATH, completions.completions, methods=["POST"], response_model=None)
    app.add_api_route(chat.PATH, chat.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", models.list_models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{model:path}", models.show_model, methods=["GET"], response_model=None)
    app.add_api_route("/v1/load_lora_adapter", models.load_adapter, methods=["POST"], response_model=None)
    app.add_api_route("/v1/unload_lora_adapter", models.unload_adapter, methods=["POST"], response_model=None)
    app.add_api_route("/health", _health, methods=["GET", "HEAD"], response_model=None)
    app.add_api_route("/metrics", _metrics, methods=["GET"], response_model=None)
    app.add_api_route("/", _page, methods=["GET"], response_model=None)
    app.add_api_route(PREFIX + "{name}", _page_file, methods=["GET"], response_model=None)
    return app


async def _health(http: Request) -> Response:
    if service_of(http).draining:
        raise draining()
    return JSONResponse({"status": "ok"})


async def _metrics(http: Request) -> Response:
    service = service_of(http)
    load = service.engine.load
    gauges = [
        ("peftune_requests_running", "Texts in the batch.", load.running),
        ("peftune_requests_waiting", "Texts in the queue.", load.waiting),
        ("peftune_slots", "Places in the batch.", load.slots),
        ("peftune_adapters_loaded", "Adapters in memory.", len(service.bank.names)),
        ("peftune_engine_steps_total", "Forwards of the batch.", load.steps),
    ]
    return Response(service.metrics.text(gauges), media_type=metrics.CONTENT_TYPE)


async def _page(http: Request) -> Response:
    page: Page = http.app.state.page
    return page.response()


async def _page_file(http: Request) -> Response:
    page: Page = http.app.state.page
    return page.response(http.path_params["name"])
