"""Replicate's API in front of the server, for clients of Replicate."""

from collections.abc import Iterator

import pytest

from tests.replicate_stand_in import StandIn, stand_in
from tests.server import Server


@pytest.fixture(scope="session")
def api(server: Server) -> Iterator[StandIn]:
    """A stand-in for Replicate, in front of the server with the demo model."""
    with stand_in(server.url) as api:
        yield api
