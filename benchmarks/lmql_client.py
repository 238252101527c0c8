"""LMQL's client for Replicate, sent to a stand-in for Replicate on loopback. Importing this module imports LMQL."""

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest import mock

import aiohttp
import lmql.runtime.caching
from lmql.models.lmtp.lmtp_replicate_client import LMTPReplicateClient

from tests.replicate_stand_in import MODEL, OWNER, TOKEN

REPLICATE = "https://api.replicate.com"


class Redirected:
    """An HTTP session that sends requests for Replicate to a stand-in, and refuses all others."""

    def __init__(self, session: aiohttp.ClientSession, stand_in: str) -> None:
        self._session = session
        self._stand_in = stand_in

    def request(self, method: str, url: Any, **options: Any) -> Any:
        """Send a request. Raises ValueError if it would leave this machine."""
        address = str(url).replace(REPLICATE, self._stand_in)
        if not address.startswith(self._stand_in):
            raise ValueError(f"the request to {address} would leave this machine")
        return self._session.request(method, address, **options)

    get = partialmethod(request, "GET")
    post = partialmethod(request, "POST")


@contextmanager
def redirected(stand_in: Callable[[], str], cache: Path) -> Iterator[None]:
    """Send LMQL's new clients to the address that `stand_in` returns; keep LMQL's cache in `cache`."""
    begin = LMTPReplicateClient.__init__

    def begin_redirected(
        client: Any, model: str, session: aiohttp.ClientSession, endpoint: str, **options: Any
    ) -> None:
        begin(client, model, Redirected(session, stand_in()), endpoint, **options)

    with (
        mock.patch.object(LMTPReplicateClient, "__init__", begin_redirected),
        mock.patch.object(lmql.runtime.caching, "CACHE_DIR", cache),
        mock.patch.dict(os.environ, REPLICATE_API_TOKEN=TOKEN),
    ):
        yield


def model_clause(weights: Path) -> str:
    """The `from` clause of a query."""
    return f'lmql.model("ignored", endpoint="replicate:{OWNER}/{MODEL}", tokenizer="{weights}")'


@asynccontextmanager
async def lmtp_client() -> AsyncIterator[Any]:
    """LMQL's client for Replicate, without its query language."""
    async with aiohttp.ClientSession() as session:
        yield LMTPReplicateClient(f"{OWNER}/{MODEL}", session, f"replicate:{OWNER}/{MODEL}")
