"""What the engine's test files share."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def tokenizer(demo_weights: Path) -> PreTrainedTokenizerBase:
    """The demo model's."""
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(demo_weights, local_files_only=True)
    return loaded
