"""Architectures of Transformers on tiny random models: equal to Transformers, or refused. docs/models.md lists all."""

import os
import re
import subprocess
import sys

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lmtp.runners.model import UnsupportedModel
from lmtp.runners.runner import open_runner
from tests import models, table
from tests.probe import CAUSAL, CLASSIFIER, MASKED, MULTIMODAL, probe
from tests.server import ROOT

SLOTS = ("bert", "codegen", "doge", "falcon", "fuyu", "git", "llama4_text", "moshi", "opt", "phi", "xglm")
OWN = ("bart", "falcon_mamba", "gpt_neo", "recurrent_gemma", "roberta", "whisper")
REFUSED = ("cpmant", "reformer", "xlnet")


@pytest.mark.parametrize("model_type", [*SLOTS, *OWN, *REFUSED])
def test_an_architecture_is_served_as_the_page_says(model_type: str) -> None:
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    row = probe(model_type, architecture, CAUSAL)
    assert table.served(row) == table.committed()[model_type, architecture], row.reason


@pytest.mark.parametrize(
    ("model_type", "architecture", "auto"),
    [
        ("longformer", "LongformerForMaskedLM", MASKED),
        ("funnel", "FunnelForMaskedLM", MASKED),
        ("perceiver", "PerceiverForMaskedLM", MASKED),
        ("t5", "T5ForSequenceClassification", CLASSIFIER),
        ("canine", "CanineForSequenceClassification", CLASSIFIER),
    ],
)
def test_an_encoder_is_served_as_the_page_says(model_type: str, architecture: str, auto: str) -> None:
    row = probe(model_type, architecture, auto)
    assert table.served(row) == table.committed()[model_type, architecture], row.reason


@pytest.mark.skipif("NIGHTLY" not in os.environ, reason="takes minutes: NIGHTLY=1")
def test_the_page_is_what_the_probe_finds_for_all_architectures() -> None:
    before = table.committed()
    text = table.PAGE.read_text(encoding="utf-8")
    try:
        run = subprocess.run(
            [sys.executable, ROOT / "script/models_table"], check=False, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        assert table.committed() == before
    finally:
        table.PAGE.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_an_encoder_is_refused_as_a_decoder(model_type: str) -> None:
    with pytest.raises(
        UnsupportedModel, match="its attention sees the tokens that follow, so it cannot continue a text"
    ):
        open_runner(models.build(model_type, decoder=False))


def test_lengths_that_only_the_models_own_code_knows_keep_it_out_of_slots() -> None:
    """The self-check's texts are shorter than these lengths."""
    runner = open_runner(models.build("gpt_neo"))
    assert (
        runner.reason == "slots do not serve it: its configuration bounds attention by window_size, which masks do not"
    )


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("llava", "LlavaForConditionalGeneration"),
        ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
        ("paligemma", "PaliGemmaForConditionalGeneration"),
        ("unlimited_ocr", "UnlimitedOcrForConditionalGeneration"),
        ("blip", "BlipForConditionalGeneration"),
        ("idefics", "IdeficsForVisionText2Text"),
    ],
)
def test_a_multimodal_models_text_is_served_as_the_page_says(model_type: str, architecture: str) -> None:
    row = probe(model_type, architecture, MULTIMODAL)
    assert table.served(row) == table.committed()[model_type, architecture], row.reason


def test_the_page_quotes_no_error_of_python() -> None:
    assert re.findall(r"\w+Error: .*", table.PAGE.read_text(encoding="utf-8")) == []
