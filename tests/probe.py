"""Which runner serves an architecture, and whether it serves it as Transformers does: a tiny random model is compared
with Transformers' own `generate` and one plain forward pass."""

import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from lmtp.engine.engine import Engine
from lmtp.protocol import Encode, Generate, Score
from lmtp.runners.model import UnsupportedModel, accepts_positions, limits_of, token_types
from lmtp.weights.kinds import PREFIX_LM
from tests import models
from tests.encoders import tokenizer_of
from tests.tiny import answers, start

EXACT = "exact"
WRONG = "WRONG"
REFUSED = "refused"
UNBUILT = "not built"

TOKENS = 30
"""Generated for each prompt. The longest prompt and these are more than twice `models.LENGTH`."""


CAUSAL = "AutoModelForCausalLM"
MULTIMODAL = "AutoModelForMultimodalLM"
ENCODER_DECODER = "AutoModelForSeq2SeqLM"
MASKED = "AutoModelForMaskedLM"
CLASSIFIER = "AutoModelForSequenceClassification"


@dataclass(frozen=True)
class Row:
    """What the probe found for one type of model."""

    model_type: str
    architecture: str
    verdict: str
    runner: str = ""
    reason: str = ""


def probe(model_type: str, architecture: str, auto: str = CAUSAL) -> Row:
    """Build a tiny model with an Auto class of Transformers, serve it, and compare."""
    named = model_type, architecture
    try:
        model = models.build(model_type, getattr(transformers, auto), decoder=auto in (CAUSAL, MULTIMODAL))
    except Exception as error:
        return Row(*named, UNBUILT, reason=said(error))
    try:
        # The reference is a model that no runner has seen.
        engine = start(copy.deepcopy(model), tokenizer_of("bert") if auto in (MASKED, CLASSIFIER) else None)
    except UnsupportedModel as error:
        return Row(*named, REFUSED, reason=str(error))
    except Exception as error:
        return Row(*named, WRONG, reason=f"setup: {said(error)}")
    try:
        found = differences(model, engine) if not engine.limits.head else other_answers(model, engine)
    except Exception as error:
        found = [said(error)]
    finally:
        engine.stop()
    return Row(*named, WRONG if found else EXACT, engine.runner.description, "; ".join(found) or engine.runner.reason)


def differences(model: PreTrainedModel, engine: Engine) -> list[str]:
    """What the engine does otherwise than Transformers, in words; nothing if it is exact. The prompts of an
    encoder-decoder model are its sources."""
    found = []
    prompts = random_prompts(3, 17, 41)
    alone = [answers(engine, Generate(stream_id=0, prompt=p, max_tokens=TOKENS)).ids() for p in prompts[2:]]
    batch = answers(engine, *(Generate(stream_id=i, prompt=p, max_tokens=TOKENS) for i, p in enumerate(prompts)))
    expected = [greedy(model, p, TOKENS) for p in prompts]
    if alone != expected[2:]:
        found.append("alone it differs from generate")
    if [batch.ids(i) for i in range(len(prompts))] != expected:
        found.append("beside others it differs from generate")
    more = prompts[2] + expected[2] + prompts[0]
    if engine.limits.source:
        more = prompts[2]  # the same source once more
    if answers(engine, Generate(stream_id=0, prompt=more, max_tokens=4)).ids() != greedy(model, more, 4):
        found.append("a continued text differs from generate")
    (text,) = random_prompts(60, seed=1)
    scored = answers(engine, Score(stream_id=0, prompt=text[:9], scored=text[9:])).tokens()
    got = torch.tensor([token.logprob for token in scored])
    at = torch.arange(len(got)), torch.tensor(text[9:])
    distance = min(
        (torch.log_softmax(logits, -1)[at] - got).abs().max().item()
        for logits in forward_passes(model, text[:9], text[9:], engine.limits.target_start)
    )
    if not distance < 1e-3:
        found.append(f"log-probabilities are {distance:.2g} from those of a forward pass")
    return found


@torch.inference_mode()
def other_answers(model: PreTrainedModel, engine: Engine) -> list[str]:
    """The same of an encoder: its log-probabilities of tokens or labels, side by side and alone, against those of a
    plain forward pass over each text."""
    mask: int = engine.tokenizer.mask_token_id
    labels = engine.limits.head.labels if engine.limits.head else ()
    prompts = [[token + (token == mask) for token in prompt] for prompt in random_prompts(9, 17, 41, 41)]
    texts = [[*prompt[:2], mask, *prompt[3:], models.END] for prompt in prompts]
    operations = [Encode(stream_id=i, prompt=text, top_logprobs=5) for i, text in enumerate(texts)]
    together, alone = answers(engine, *operations), [answers(engine, operation) for operation in operations]
    found = []
    for i, text in enumerate(texts):
        ids = torch.tensor([text])
        given = {"attention_mask": torch.ones_like(ids)} if accepts_mask(model) else {}
        logits = fresh(model)(input_ids=ids, **given).logits[0].float()
        own = torch.log_softmax(logits if labels else logits[2], -1)
        for which, got in (("beside others", together.tokens(i)), ("alone", alone[i].tokens(i))):
            top = got[0].top_logprobs
            distance = max(abs(own[token].item() - value) for token, value in top.items()) if top else math.inf
            if not distance < 1e-3:
                found.append(f"{which} the log-probabilities of text {i} are {distance:.2g} from a forward pass")
    return found[:1]


def accepts_mask(model: PreTrainedModel) -> bool:
    """Whether the model takes an attention mask."""
    return "attention_mask" in inspect.signature(model.forward).parameters


def fresh(model: PreTrainedModel) -> Any:
    """The model as it was loaded: BigBird remembers that it once read a short text."""
    base: Any = model.base_model
    if model.config.model_type == "big_bird":
        base.set_attention_type(model.config.attention_type)
    return model


@torch.inference_mode()
def forward_passes(
    model: PreTrainedModel, prompt: list[int], scored: list[int], target_start: Sequence[int]
) -> Iterator[torch.Tensor]:
    """The logits ``[scored, vocabulary]`` before each scored token: of a plain forward pass, and of one with the
    positions that generate gives, since RoBERTa's own begin elsewhere."""
    if target_start:
        target = torch.tensor([[*target_start, *scored[:-1]]])
        yield model(input_ids=torch.tensor([prompt]), decoder_input_ids=target).logits[0, -len(scored) :].float()
        return
    ids = torch.tensor([prompt + scored[:-1]])
    if model.config.model_type in PREFIX_LM:
        types = token_types(ids, len(prompt))
        yield model(input_ids=ids, token_type_ids=types, use_cache=False).logits[0, -len(scored) :].float()
        return
    yield model(input_ids=ids, use_cache=False).logits[0, -len(scored) :].float()
    if accepts_positions(model):
        positions = torch.arange(ids.shape[1])[None]
        yield model(input_ids=ids, use_cache=False, position_ids=positions).logits[0, -len(scored) :].float()


def greedy(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """What Transformers' own greedy generate adds to the prompt, in which 0 is a token like any other."""
    ids = torch.tensor([prompt])
    generate: Any = model.generate  # typed as a tensor
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": max_tokens, "do_sample": False}
    if model.config.model_type in PREFIX_LM:
        arguments["token_type_ids"] = torch.zeros_like(ids)
    try:
        output = generate(ids, **arguments)
    except (AttributeError, TypeError, ValueError):  # some models' own caches do not work
        output = generate(ids, **arguments, use_cache=False)
    begun = len(limits_of(model).target_start) or len(prompt)
    added: list[int] = output[0, begun:].tolist()
    return added


def random_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random token ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, models.VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def said(error: Exception) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:160]}"
