"""The page at `/`, and what only it asks for: a stream of events, who is served, and a way to kill the drafter.

    /, /style.css, /page.js    hand-written files; nothing of them comes from another host
    /v1/pearl/events           what passes do, as server-sent events; see `event_stream`
    /v1/pearl/state            models, modes, and what this browser may do
    /v1/pearl/kill             ends the drafter's process by SIGKILL. The text goes on; the engine starts another one

Whoever may kill a process of this machine sits at it: the request comes from this machine, to an address that only it
has, from the page itself, and not through a proxy.
"""

from __future__ import annotations

import contextlib
import os
import signal
from importlib import resources
from ipaddress import ip_address
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from pearl import __version__
from pearl.server import streaming
from pearl.server.errors import APIError
from pearl.server.event_stream import EventStream

FILES = {"/": "index.html", "/style.css": "style.css", "/page.js": "page.js"}
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
PROXIED = ("forwarded", "via", "x-forwarded-for", "x-real-ip")  # headers of those who ask for somebody else
FROM_PAGE = "x-pearl-page"  # a header that no other site can send


def add_page(app: FastAPI, service: Any) -> None:
    event_stream = app.state.event_stream = EventStream(service)
    for path, name in FILES.items():
        app.add_api_route(path, _file(name), include_in_schema=False, methods=["GET", "HEAD"])

    @app.get("/v1/pearl/events", include_in_schema=False)
    async def events(key: str = "") -> Response:
        service.engine  # noqa: B018 (raises where there is none yet)
        return StreamingResponse(
            event_stream.stream(key[:64]), media_type="text/event-stream", headers=streaming.HEADERS
        )

    @app.get("/v1/pearl/state", include_in_schema=False)
    async def state(request: Request) -> Response:
        told = {"version": __version__, "status": service.status, "model": service.model}
        if service.healthy:
            told |= _state(service) | {"may_kill": _why_not_kill(request, service) is None}
        return JSONResponse(told)

    @app.post("/v1/pearl/kill", include_in_schema=False)
    async def kill(request: Request) -> Response:
        if refusal := _why_not_kill(request, service):
            raise APIError(403, refusal, "refused")
        pid = service.engine.runtime.drafter_pid
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.kill(pid, signal.SIGKILL)
        return JSONResponse({"killed": pid, "t": event_stream.now()})


def _file(name: str) -> Any:
    content = resources.files("pearl.server").joinpath("page", name).read_bytes()
    kind = f"{TYPES[name.rpartition('.')[2]]}; charset=utf-8"

    async def answer() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return answer


def _state(service: Any) -> dict[str, Any]:
    engine = service.engine
    config, runtime = engine.config, engine.runtime
    return {
        "target": config.target,
        "draft": config.draft if {*engine.modes} - {"ar", "ar-all"} else None,
        "mode": runtime.schedule.mode,
        "modes": engine.modes,
        "chat": bool(engine.tokenizer.chat_template),
        "max_length": runtime.checked.max_length,
        "places": engine.model.max_sequences,
        "where": engine.description.splitlines(),
    }


def _why_not_kill(request: Request, service: Any) -> str | None:
    """Why this request may not; None: it may."""
    if not service.engine.runtime.drafter_pid:
        return "This server has started no drafter that could be killed."
    if not (request.client and _loopback(request.client.host)) or any(name in request.headers for name in PROXIED):
        return "The drafter is killed from the machine that it runs on, and not through a proxy."
    if not _loopback(request.url.hostname or ""):
        return "The drafter is killed at an address of this machine alone, like http://127.0.0.1:8000."
    if request.method == "POST" and FROM_PAGE not in request.headers:
        return f"The drafter is killed from the page; another program sends the header {FROM_PAGE}."
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return "The drafter is killed from the page of its own server."
    return None


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
