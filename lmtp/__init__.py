"""A language model behind the Language Model Transport Protocol."""

__version__ = "0.1.0"
