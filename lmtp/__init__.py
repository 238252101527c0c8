"""A language model behind the Language Model Transport Protocol."""
