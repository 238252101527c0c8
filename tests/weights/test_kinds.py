"""The class that loads a model is chosen from its config.json; multimodal models serve their text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForMultimodalLM, BertConfig, LlamaConfig, PreTrainedConfig, T5Config

from lmtp.weights.kinds import Kind, kind_of, refuse_without_text
from lmtp.weights.load import load
from lmtp.weights.text_only import keep_text_only
from tests.hub import Hub
from tests.tiny import BASE, own_greedy, random_prompts
from tests.weights.conftest import Download
from tests.weights.helpers import refusal, saved, seeded, served

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
SQUARES: dict[str, Any] = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 14}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
MULTIMODAL: dict[str, dict[str, Any]] = {
    "Gemma3Config": {"text_config": {**BASE, "head_dim": 8, "sliding_window": 8}, "vision_config": VISION, "mm_tokens_per_image": 4},
    "Llama4Config": {"text_config": {**BASE, "head_dim": 8, "num_local_experts": 2, "attention_chunk_size": 8, "intermediate_size_mlp": 64}, "vision_config": {**VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}},
    "Qwen2_5_VLConfig": {"text_config": {**BASE, "rope_parameters": MROPE}, "vision_config": {**SQUARES, "out_hidden_size": 32, "fullatt_block_indexes": [0]}},
    "LlavaConfig": {"text_config": {**BASE, "model_type": "llama"}, "vision_config": {**VISION, "model_type": "clip_vision_model"}},
    "Mistral3Config": {"text_config": {**BASE, "model_type": "mistral", "head_dim": 8}, "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 16}},
}  # fmt: skip


@pytest.mark.parametrize("name", MULTIMODAL)
def test_a_multimodal_model_serves_its_text_as_the_full_model_does_without_the_rest_in_memory(
    name: str, tiny: Path, tmp_path: Path
) -> None:
    config = getattr(transformers, name)(**MULTIMODAL[name])
    for key in ("image_token_index", "image_token_id"):
        if hasattr(config, key):
            setattr(config, key, 120)
    full = seeded(AutoModelForMultimodalLM.from_config(config))
    directory = saved(full, tmp_path / "weights", tiny)
    loaded = load(directory, "float32", "cpu")
    assert loaded.model.num_parameters() < full.num_parameters()
    assert not any("vision" in key or "visual" in key for key in loaded.model.state_dict())
    prompts = random_prompts(5, 17)
    prompts = [[min(token, 119) for token in prompt] for prompt in prompts]
    assert served(loaded, *prompts) == [own_greedy(full, prompt, 12) for prompt in prompts]


@pytest.mark.parametrize(
    ("config", "architectures", "kind"),
    [
        (LlamaConfig(), ["LlamaForCausalLM"], Kind.CAUSAL),
        (LlamaConfig(), None, Kind.CAUSAL),
        (BertConfig(is_decoder=True), ["BertLMHeadModel"], Kind.CAUSAL),
        (BertConfig(), ["BertForMaskedLM"], Kind.MASKED),
        (BertConfig(), None, Kind.MASKED),
        (BertConfig(), ["BertForSequenceClassification"], Kind.CLASSIFIER),
        (LlamaConfig(), ["LlamaForSequenceClassification"], Kind.CLASSIFIER),
        (T5Config(), ["T5ForConditionalGeneration"], Kind.SEQ2SEQ),
        (transformers.BartConfig(), ["BartModel"], Kind.SEQ2SEQ),
        (transformers.Gemma3Config(), ["Gemma3ForConditionalGeneration"], Kind.MULTIMODAL),
        (transformers.Llama4Config(), ["Llama4ForConditionalGeneration"], Kind.MULTIMODAL),
        (transformers.Qwen2AudioConfig(), ["Qwen2AudioForConditionalGeneration"], Kind.MULTIMODAL),
    ],
)
def test_architectures_decide_and_else_the_model_type(
    config: PreTrainedConfig, architectures: list[str] | None, kind: Kind
) -> None:
    config.architectures = architectures
    assert kind_of(config, "org/name") is kind


def test_architectures_come_before_the_classes_of_the_models_own_code() -> None:
    config = BertConfig(architectures=["BertForSequenceClassification"])
    config.auto_map = {"AutoModelForMaskedLM": "own.Masked", "AutoModelForSequenceClassification": "own.Classifier"}
    assert kind_of(config, "org/name") is Kind.CLASSIFIER


@pytest.mark.parametrize(
    ("model_type", "architectures", "found"),
    [
        ("vit", ["ViTForImageClassification"], "a ViTForImageClassification"),
        ("clip", None, "a clip"),
        ("llama", ["LlamaForTokenClassification"], "a LlamaForTokenClassification"),
        ("qwen2", ["Qwen2ForRewardModel"], "a Qwen2ForRewardModel"),
        ("bert", ["BertForTokenClassification"], "a BertForTokenClassification"),
        ("t5", ["T5EncoderModel"], "a T5EncoderModel"),
    ],
)
def test_what_is_no_language_model_is_refused_before_its_weights_are_fetched(
    hub: Hub, download: Download, tmp_path: Path, model_type: str, architectures: list[str] | None, found: str
) -> None:
    config = {"model_type": model_type, "architectures": architectures}
    hub.repositories["org/tiny"].files["config.json"] = json.dumps(config).encode()
    with refusal(f"org/tiny is no language model but {found}: choose"):
        download("org/tiny", tmp_path)
    assert hub.fetched() == {"config.json"}


@pytest.mark.parametrize(
    ("model_type", "found"),
    [
        ("blip-2", "a Blip2ForConditionalGeneration, which needs pixel_values besides text"),
        ("pi0", "a PI0ForConditionalGeneration, which does not generate text from text"),
        ("qwen2_5_omni", "a Qwen2_5OmniForConditionalGeneration, which does not generate text from text"),
        ("diffusion_gemma", "a DiffusionGemmaForBlockDiffusion, which has a decoder apart from"),
        ("vision-encoder-decoder", "a VisionEncoderDecoderModel, which does not generate text from text"),
    ],
)
def test_a_multimodal_model_that_does_not_continue_text_is_refused_before_its_weights_are_fetched(
    hub: Hub, download: Download, tmp_path: Path, model_type: str, found: str
) -> None:
    parts = {"encoder": {"model_type": "vit"}, "decoder": {"model_type": "gpt2"}} if "decoder" in model_type else {}
    hub.repositories["org/tiny"].files["config.json"] = json.dumps({"model_type": model_type, **parts}).encode()
    with refusal(f"org/tiny is {found}", "choose a model that continues plain text"):
        download("org/tiny", tmp_path)
    assert hub.fetched() == {"config.json"}


def test_a_multimodal_model_that_fails_on_plain_text_is_refused_in_one_sentence() -> None:
    class Deaf(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor) -> None:
            raise TypeError("no sound\x1b[2J\nTraceback")

    with refusal(r"A Deaf does not take plain text (no sound\x1b[2J): choose another model."):
        keep_text_only(Deaf())  # type: ignore[arg-type]


def test_a_model_type_that_transformers_does_not_know_is_refused_before_its_weights_are_fetched(
    hub: Hub, download: Download, tmp_path: Path
) -> None:
    hub.repositories["org/tiny"].files["config.json"] = b'{"model_type": "evil", "auto_map": {"AutoConfig": "a.B"}}'
    command = f"script/download_weights org/tiny --trust-remote-code --to {tmp_path / 'own'}"
    with refusal(f"org/tiny runs code of its own: if you trust it, run `{command}`"):
        download("org/tiny", tmp_path / "own")
    hub.repositories["org/tiny"].files["config.json"] = b'{"model_type": "evil"}'
    with refusal("Transformers cannot read the config.json of org/tiny", "evil"):
        download("org/tiny", tmp_path / "unknown")
    assert hub.fetched() == {"config.json"}


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_an_encoder_is_loaded_with_the_head_that_it_was_trained_with(name: str, tiny: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    full = seeded(getattr(transformers, name)(BertConfig(num_hidden_layers=1, **sizes)))
    loaded = load(saved(full, tmp_path / "weights", tiny), "float32", "cpu")
    ids = torch.tensor([[5, 6, 7]])
    assert type(loaded.model) is type(full)
    assert torch.equal(loaded.model(input_ids=ids).logits, full(input_ids=ids).logits)


def test_an_encoder_decoder_is_loaded_whole(tiny: Path, tmp_path: Path) -> None:
    config = T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    full = seeded(transformers.T5ForConditionalGeneration(config))
    loaded = load(saved(full, tmp_path / "weights", tiny), "float32", "cpu")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(
        loaded.model(input_ids=ids, decoder_input_ids=ids).logits, full(input_ids=ids, decoder_input_ids=ids).logits
    )


def test_a_decoder_whose_tokens_see_those_that_follow_is_refused_and_one_of_images_only_is_not() -> None:
    both = transformers.Gemma3TextConfig(use_bidirectional_attention=True)
    with refusal("org/name is a Gemma3ForCausalLM, which lets all tokens of a prompt see each other"):
        refuse_without_text(Kind.CAUSAL, both, "org/name")
    images = transformers.Gemma4Config(text_config={"use_bidirectional_attention": "vision"})
    refuse_without_text(Kind.MULTIMODAL, images, "org/name")


def test_paligemma_is_not_refused_for_its_token_types_say_where_the_prompt_ends() -> None:
    config = transformers.PaliGemmaConfig()
    assert config.get_text_config().use_bidirectional_attention
    refuse_without_text(Kind.MULTIMODAL, config, "org/name")
