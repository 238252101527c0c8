"""The gateway's HTTP server: routes, who may ask, limits, and errors that every protocol's clients understand."""

import asyncio
import base64
import hashlib
import hmac
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web

from gateway import lmtp_websocket
from gateway.errors import ApiError, told
from gateway.inspector import describe, inspect
from gateway.model import Models
from gateway.openai_chat import chat
from gateway.openai_completions import complete
from gateway.openai_models import get_model, list_models
from gateway.target import Target

MAX_BODY = 2**24
"""Bytes of a request's body."""

MAX_BODY_SECONDS = 60.0
"""How long a request's body may take to arrive. Meanwhile it holds one of the places for requests."""

MAX_REQUESTS = 512
"""Requests at once; as many WebSockets may be open beside them, since most of these are idle."""

MAX_IDLE_SECONDS = 75.0
"""How long a connection may wait for its next request. Proxies, which must be the first to close, take up to 60."""

MAX_UNREAD_SECONDS = 60.0
"""How long a client may take nothing of what was sent to it. Then its connection closes, which ends its predictions."""

PAGE = Path(__file__).parent / "page.html"

LOOPBACK = ("localhost", "127.0.0.1", "::1")

PAGE_HEADERS = {
    # The page is one file: its own script runs, and it asks nobody but this server.
    "Content-Security-Policy": "default-src 'none'; script-src {script}; style-src {style}; connect-src 'self';"
    " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Gateway:
    """An application in front of a target."""

    def __init__(self, target: Target, name: str = "", api_key: str = "", local: bool = True) -> None:
        """``name``: what clients call the model. ``api_key``: what they must present; empty asks for none. ``local``:
        it listens on loopback, so requests for another host's name are attacks (DNS rebinding)."""
        self._target = target
        self._models = Models(target, name)
        self._api_key = api_key.encode(errors="surrogateescape")
        self._local = local
        self._open = Counter[str]()
        """Requests and WebSockets."""

    def application(self) -> web.Application:
        """The routes."""
        application = web.Application(client_max_size=MAX_BODY, middlewares=[self._guard])
        router, target, models = application.router, self._target, self._models
        router.add_get("/v1/models", partial(list_models, models=models))
        router.add_get("/v1/models/{name:.+}", partial(get_model, models=models))
        router.add_post("/v1/completions", partial(complete, target=target, models=models))
        router.add_post("/v1/chat/completions", partial(chat, target=target, models=models))
        router.add_get("/inspect", partial(describe, models=models))
        router.add_post("/inspect", partial(inspect, target=target, models=models))
        router.add_get("/", self._page)
        router.add_route("*", "/{path:.*}", self._unknown)
        application.on_cleanup.append(lambda _: self._target.close())
        return application

    def runner(self) -> web.AppRunner:
        """The application, ready to be set up."""
        # A client that leaves cancels its handler, and with it what runs on the target.
        return web.AppRunner(
            self.application(),
            handler_cancellation=True,
            shutdown_timeout=2,
            access_log=None,
            keepalive_timeout=MAX_IDLE_SECONDS,
        )

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check the request, answer it, and put errors into words. A WebSocket is LMTP, whatever its path."""
        kind = "WebSockets" if request.headers.get("Upgrade", "").lower() == "websocket" else "requests"
        self._open[kind] += 1
        try:
            self._check(request, kind)
            _close_if_unread(request)
            if kind == "WebSockets":
                return await lmtp_websocket.serve(request, self._target)
            await _receive(request)
            return await handler(request)
        except ConnectionError:
            raise  # the client has left
        except web.HTTPRequestEntityTooLarge:
            return _answer(ApiError(413, f"The body has more than {MAX_BODY} bytes."))
        except Exception as error:
            return _answer(told(error))
        finally:
            self._open[kind] -= 1

    def _check(self, request: web.Request, kind: str) -> None:
        """Raise ApiError for a request that is not to be answered."""
        if self._open[kind] > MAX_REQUESTS:
            raise ApiError(503, f"{MAX_REQUESTS} {kind} are open; ask again later.")
        if self._local and _hostname(f"//{request.host}") not in LOOPBACK:
            raise ApiError(403, "This gateway answers only requests for localhost; start it with --host for others.")
        origin = request.headers.get("Origin", "")
        if origin and origin.partition("://")[2] != request.host:
            raise ApiError(403, "Pages of other sites may not use this gateway.")
        if self._api_key and not hmac.compare_digest(_key(request), self._api_key):
            raise ApiError(401, "Give the gateway's API key as a bearer token.", code="invalid_api_key")

    async def _page(self, request: web.Request) -> web.StreamResponse:
        page = PAGE.read_text(encoding="utf-8")
        hashes = {name: _hash_of(page, name) for name in ("script", "style")}
        headers = {name: value.format(**hashes) for name, value in PAGE_HEADERS.items()}
        return web.Response(text=page, content_type="text/html", headers=headers)

    async def _unknown(self, request: web.Request) -> web.StreamResponse:
        raise ApiError(404, f"There is no {request.method} {request.path[:200]} here.", code="unknown_url")


async def _receive(request: web.Request) -> None:
    """Read the body, which the request keeps for its handler."""
    try:
        async with asyncio.timeout(MAX_BODY_SECONDS):
            await request.read()
    except TimeoutError:
        raise ApiError(408, f"The body took more than {MAX_BODY_SECONDS:g} seconds to arrive.") from None


def _close_if_unread(request: web.Request) -> None:
    """Let the kernel watch over the connection: it costs nothing for each token. Only Linux does."""
    connection = request.get_extra_info("socket")
    if connection is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(MAX_UNREAD_SECONDS * 1000))


def _answer(error: ApiError) -> web.Response:
    # A browser asks for the key, as the password of any user, because of the header of 401.
    headers = {401: {"WWW-Authenticate": 'Basic realm="gateway"'}, 503: {"Retry-After": "1"}}
    return web.json_response(error.document(), status=error.status, headers=headers.get(error.status))


def _hash_of(page: str, element: str) -> str:
    """The source expression that lets the page's one element of a name run, and no other."""
    content = page.partition(f"<{element}>")[2].partition(f"</{element}>")[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _hostname(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def _key(request: web.Request) -> bytes:
    """The key of a request: a bearer token, or the password of basic authentication, which WebSocket clients and
    browsers take from a URL or ask for. aiohttp escapes bytes that are no UTF-8 as surrogates."""
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return given.strip().encode(errors="surrogateescape")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(given, validate=True).partition(b":")[2]
        except ValueError:
            pass
    return b""
