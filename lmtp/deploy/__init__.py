"""From models.toml to one build directory for each container: script/models."""


class DeployError(Exception):
    """models.toml or what it names cannot be built or pushed; the message says where, and what to do about it."""
