"""What goes wrong with a request, in the error shape of the OpenAI protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse


class RequestError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: names the value, the cause and the mend.
        code: a short fixed name of the cause, for programs.
        param: the field of the request that is wrong, None where it is no field.
        headers: more headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """The protocol's class of errors that the status belongs to."""
        named = {401: "authentication_error", 429: "rate_limit_error"}
        return named.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        """The JSON that is sent."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def answer_error(_: Request, error: Exception) -> JSONResponse:
    """A `RequestError` as it was meant; anything else is a defect of the server, which says no more than its kind."""
    if not isinstance(error, RequestError):
        error = RequestError(
            500, f"the server failed on this request ({type(error).__name__}); its log says where", "defect"
        )
    return error.response()
