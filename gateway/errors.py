"""Errors as clients are told them, in the format of OpenAI's API."""

import logging
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestPayloadError

from gateway.target import TargetError

log = logging.getLogger(__name__)

UNEXPECTED = "The gateway has failed; its log says why."


class ApiError(Exception):
    """An error in the API's format."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def document(self) -> dict[str, Any]:
        """The body of the response."""
        kinds = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def told(error: Exception) -> ApiError:
    """What a client is told of an error. One that was not foreseen is logged, and a client learns nothing of it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TargetError):
        return ApiError(error.status, str(error))
    if isinstance(error, web.HTTPException):  # of aiohttp: no route, no WebSocket's handshake
        return ApiError(error.status, f"{error.text}.")
    if isinstance(error, RequestPayloadError):
        return ApiError(400, "The body is not what its headers say.")
    if isinstance(error, RecursionError):  # read, but too deep to be passed on
        return ApiError(400, "The request is nested too deeply.")
    log.error("An error that was not foreseen", exc_info=error)
    return ApiError(500, UNEXPECTED)
