"""What the model answers, by Transformers alone: greedy `generate`, and one plain forward pass for the probabilities."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.soak.model import VOCABULARY
from tests.tiny import END, own_logits

LONGEST = 24
"""Tokens of an answer."""

TOP = 10
"""Most likely tokens known at each position of an answer."""

CLEAR = 1e-3
"""How far ahead the most likely token must be: rounding in another batch must not choose another one."""

OPTIONS = ["yes", "no", "maybe so", " Paris", "Rome is it", "42"]


@dataclass(frozen=True)
class Row:
    """A prompt and its greedy answer, perhaps with only some tokens allowed."""

    prompt: str
    system_prompt: str
    ids: list[int]
    """The prompt's tokens, by the chat template."""
    allowed: list[int]
    """The tokens that may be generated; empty for all."""
    tokens: list[int]
    ended: bool
    """Whether the answer ends here, with an end-of-sequence token."""
    texts: list[str]
    """The answer's text after each of its tokens."""
    logprobs: list[float]
    top: list[dict[int, float]]
    """The most likely tokens at each position of the answer, most likely first."""
    scores: list[float]
    """Log-probability of each token of prompt and answer, without a mask; 0 for the first."""
    options: dict[str, float]
    """Log-probability of each of OPTIONS as the beginning of the answer; only after short prompts."""

    def finish(self, count: int) -> str:
        """Why the answer ends after ``count`` tokens."""
        return "stop" if self.ended and count == len(self.tokens) else "length"


def make(model: PreTrainedModel, tokenizer: Any, seed: int = 0) -> list[Row]:
    """Rows of prompts of many lengths; some prompts begin alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model takes longer with more
    try:
        return _rows(model, tokenizer, random.Random(seed))
    finally:
        torch.set_num_threads(threads)


def _rows(model: PreTrainedModel, tokenizer: Any, chance: random.Random) -> list[Row]:
    words = [word for word in map(tokenizer.decode, range(300, VOCABULARY)) if word.strip().isascii() and word.strip()]
    shared = "".join(chance.choices(words, k=150))
    rows = []
    for i in range(24):
        prompt = shared * (i % 4 == 0) + "".join(chance.choices(words, k=chance.choice((1, 4, 20, 60, 300))))
        system = "".join(chance.choices(words, k=8)) if i % 3 == 0 else ""
        allowed = sorted([END] * (i % 8 == 3) + chance.sample(range(300, VOCABULARY), 5)) if i % 4 == 3 else []
        row = _row(model, tokenizer, prompt, system, allowed)
        if len(row.tokens) >= 4 or row.ended:
            rows.append(row)
    return rows


def _row(model: PreTrainedModel, tokenizer: Any, prompt: str, system_prompt: str, allowed: list[int]) -> Row:
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages.append({"role": "user", "content": prompt})
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer.encode(rendered, add_special_tokens=False)
    bias = _bias(model.config.vocab_size, allowed)
    generate: Any = model.generate  # typed as a tensor
    with torch.inference_mode():
        output = generate(
            torch.tensor([ids]),
            max_new_tokens=LONGEST,
            do_sample=False,
            pad_token_id=0,
            logits_processor=[lambda _, scores: scores + bias],
        )
    tokens: list[int] = output[0, len(ids) :].tolist()
    texts = [tokenizer.decode(tokens[: i + 1], skip_special_tokens=True) for i in range(len(tokens))]
    logits = own_logits(model, ids + tokens)
    answer = logits[len(ids) - 1 : -1] + bias
    best = answer.topk(2).values
    # Judge only as far as the choice is clear and all characters are whole.
    clear = int((best[:, 0] - best[:, 1] > CLEAR).long().cumprod(0).sum())
    count = len(list(takewhile(lambda text: "\ufffd" not in text, texts[:clear])))
    logprobs = answer.log_softmax(-1)[:count]
    top = logprobs.topk(TOP)
    return Row(
        prompt=prompt,
        system_prompt=system_prompt,
        ids=ids,
        allowed=allowed,
        tokens=tokens[:count],
        ended=count == len(tokens) and tokens[-1] == END,
        texts=texts[:count],
        logprobs=logprobs.gather(-1, torch.tensor(tokens[:count])[:, None])[:, 0].tolist(),
        top=[
            {token: value for token, value in zip(ids_, values, strict=True) if value > -1e30}
            for ids_, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ],
        scores=_scores(logits, ids + tokens)[: len(ids) + count],
        options={option: _likelihood(model, tokenizer, ids, option) for option in OPTIONS if len(ids) < 120},
    )


def _bias(vocabulary: int, allowed: Sequence[int]) -> Tensor:
    if not allowed:
        return torch.zeros(vocabulary)
    bias = torch.full((vocabulary,), -torch.inf)
    bias[list(allowed)] = 0.0
    return bias


def _scores(logits: Tensor, tokens: list[int]) -> list[float]:
    """The log-probability of each token after those before it; 0 for the first."""
    logprobs = logits[:-1].log_softmax(-1).gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
    return [0.0, *logprobs.tolist()]


def _likelihood(model: PreTrainedModel, tokenizer: Any, ids: list[int], option: str) -> float:
    tokens = ids + tokenizer.encode(option, add_special_tokens=False)
    return sum(_scores(own_logits(model, tokens), tokens)[len(ids) :])
