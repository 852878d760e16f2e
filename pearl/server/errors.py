"""What a client is told when something is wrong: always OpenAI's shape, whoever found it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from pearl.engine.prompts import PromptTooLong
from pearl.errors import EngineClosedError, UsageError, WorkerLostError

TOO_LONG = "context_length_exceeded"
_ARMS = ("str", "int", "float", "bool")  # what pydantic calls a field's kinds, where it may be of several
_log = logging.getLogger("pearl.server")
_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class APIError(Exception):
    """An answer other than 2xx. `code`: a word for programs; `param`: the field that is meant."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    @property
    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def bad(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """The request is at fault."""
    return APIError(400, message, code, param)


def from_engine(error: BaseException, fields: frozenset[str] = frozenset()) -> APIError:
    """What has kept a text from being written. `fields`: of the request, which a sentence may begin with."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, UsageError):
        said = str(error)
        word = said.split(" ", 1)[0]
        if isinstance(error, PromptTooLong):
            return bad(said, code=TOO_LONG)
        return bad(said, word if word in fields else None)
    if isinstance(error, EngineClosedError):
        dead = error.__cause__ is not None  # its thread has failed; else somebody has closed it
        return engine_dead() if dead else APIError(503, "The engine is closed.", "shutting_down")
    _log.error("a text has failed (%s: %s)", type(error).__name__, error)
    if isinstance(error, WorkerLostError):
        return engine_dead()
    return APIError(500, f"The text could not be written ({type(error).__name__}: {error}).", "internal_error")


def engine_dead() -> APIError:
    return APIError(503, "The engine is dead: the server must be started anew.", "engine_dead")


def unexpected(error: BaseException) -> APIError:
    """A fault of this server."""
    return APIError(500, f"The server has met an error of its own ({type(error).__name__}).")


def install(app: FastAPI) -> None:
    """Gives all errors of the framework that shape too."""

    async def ours(_: Request, error: Any) -> JSONResponse:
        return error.response

    async def refused(_: Request, error: Any) -> JSONResponse:
        return bad(*_first(error)).response

    async def http(_: Request, error: Any) -> JSONResponse:
        cause = error.__cause__  # met while the body was read
        if isinstance(cause, APIError):
            return cause.response
        if cause and error.status_code == 400:
            return bad(_unread(cause)).response
        said = {404: "There is nothing at this address.", 405: "This address does not take that method."}
        return APIError(
            error.status_code, said.get(error.status_code, str(error.detail)), headers=error.headers
        ).response

    app.add_exception_handler(APIError, ours)
    app.add_exception_handler(RequestValidationError, refused)
    app.add_exception_handler(HTTPException, http)


def _unread(error: BaseException) -> str:
    """Why a body could not be read."""
    if isinstance(error, UnicodeDecodeError):
        return f"The body is no {error.encoding.upper()}: byte {error.start} belongs to no character."
    if isinstance(error, RecursionError):
        return "The JSON of the body is nested too deeply."
    return f"The body can't be read ({error})."  # as a number with thousands of digits


def _first(error: RequestValidationError) -> tuple[str, str | None]:
    """The first of what is wrong, as a sentence, and its field."""
    every = error.errors()
    found = max((one for one in every if one["loc"][:2] == every[0]["loc"][:2]), key=lambda one: len(one["loc"]))
    place = [str(part) for part in found["loc"] if part != "body"]
    if found["type"] == "json_invalid":
        return "The body is no JSON.", None
    if not place:
        return "The body must be a JSON object (Content-Type: application/json).", None
    if place[0] == "prompt" and len(place) > 1:  # of several kinds, each of which it is not
        return "prompt must be a text, token ids from 0, or a list of either.", "prompt"
    names = [part for part in place if (part.isidentifier() or part.isdigit()) and part not in _ARMS]
    field = names[0] if names else place[0]
    message = found["msg"].removeprefix("Value error, ")
    return f"{'.'.join(names[:5]) or field}: {message}.".replace("..", "."), field
