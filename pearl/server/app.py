"""The application: what surrounds all requests, and the addresses that say how the server is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware

from pearl import __version__
from pearl.server import errors, page_routes, routes
from pearl.server.life import Service
from pearl.server.limits import Limits
from pearl.server.metrics import CONTENT_TYPE


def make_app(service: Service) -> FastAPI:
    """The service is started with the application, and closed with it."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.close()

    app = FastAPI(
        title="pearl",
        version=__version__,
        summary="Parallel speculative decoding behind OpenAI's interface.",
        lifespan=life,
        docs_url=None,  # its page would come from another host
        redoc_url=None,
    )
    app.state.service = service
    errors.install(app)
    _add_state(app, service)
    app.include_router(routes.make_router(service))
    page_routes.add_page(app, service)
    app.add_middleware(Limits, config=service.config, metrics=service.metrics)
    if origin := service.config.cors_origin:
        app.add_middleware(
            _CrossOrigin,
            allow_origins=[origin],
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "x-should-retry", "x-request-id"],
        )
    return app


class _CrossOrigin(CORSMiddleware):
    """Tells a page elsewhere that may not ask so in the shape of all errors."""

    def preflight_response(self, request_headers: Headers) -> Response:
        made = super().preflight_response(request_headers)
        if made.status_code < 400:
            return made
        refused = errors.bad(f"{bytes(made.body).decode()}: see --cors-origin.").response
        refused.headers.update({name: value for name, value in made.headers.items() if not name.startswith("content-")})
        return refused


def _add_state(app: FastAPI, service: Service) -> None:
    unwell: dict[int | str, dict[str, Any]] = {
        503: {"description": "It is being loaded, is shutting down, or has failed."}
    }

    @app.head("/health", include_in_schema=False)
    @app.head("/ping", include_in_schema=False)
    @app.get("/health", responses=unwell)
    @app.get("/ping", responses=unwell, include_in_schema=False)
    async def health() -> Response:
        """200 while texts are written, also while the drafter is lost: then it says `degraded`."""
        return JSONResponse({"status": service.status}, 200 if service.healthy else 503)

    @app.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": __version__})

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE)
