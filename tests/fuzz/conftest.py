"""The hub and the weights of the tests of downloads."""

from tests.weights.conftest import environment, hub, tiny, weights

__all__ = ["environment", "hub", "tiny", "weights"]
