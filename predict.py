"""The Cog predictor: a language model behind one call, with token-level control.

A prediction is either a prompt or a batch of LMTP operations; both become operations of the same generation loop.
"""

import asyncio
import contextvars
import gc
import json
import os
import time
from collections.abc import Generator, Iterator, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Optional

import cog
from cog import AsyncConcatenateIterator, BasePredictor, Input

from lmtp import cancel_relay, cancellation, protocol, settings
from lmtp.places import Places
from lmtp.protocol import Encode, Failure, Generate, Operation, RequestError

if TYPE_CHECKING:  # setup imports what needs torch, so that the inputs can be read without it
    from lmtp.completions import Completions
    from lmtp.prediction import Prediction


MAX_CHUNK = 1_000_000
"""Characters. The runtime sends a chunk of more than 6 MiB of JSON through a file, in a directory that is gone."""


class Predictor(BasePredictor):
    """Serves the model in ``weights/``."""

    def __init__(self) -> None:
        self.places = Places(int(os.environ.get("COG_MAX_CONCURRENCY") or 1))

    def setup(self) -> None:
        """Load the weights and start the engine."""
        gc.disable()  # collecting garbage takes a tenth of the start
        from lmtp.engine.engine import Engine, LoadedModel
        from lmtp.runners import compiled
        from lmtp.runners.model import defaults_of
        from lmtp.runners.runner import Runner, open_runner
        from lmtp.weights import load as weights

        cancellation.install()
        cancel_relay.install()
        chosen = settings.read()

        def open_model() -> LoadedModel:
            processes = 1
            if chosen.parallel != 1:
                from lmtp.runners import parallel  # and torch.distributed, which takes time to import
                from lmtp.runners.group import Leader

                processes = parallel.processes_for(chosen.parallel, chosen.weights, chosen.dtype)
            group = Leader(processes, parallel.__name__) if processes > 1 else None
            if group:
                loaded = parallel.load(group, chosen.weights, chosen.dtype)
            else:
                loaded = weights.load(chosen.weights, dtype=chosen.dtype)
            computes = f"{loaded.dtype} on {weights.describe(loaded.device)}".removeprefix("torch.")
            versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
            took = f"loaded in {loaded.seconds:.1f} s ({loaded.rate:.1f} GB/s)"
            print(f"{loaded.manifest.source}: {computes}, {took}; {versions}", flush=True)
            if defaults := defaults_of(loaded.model).described:
                print(f"generation_config.json: {json.dumps(defaults)}", flush=True)
            started = time.monotonic()
            names = list(loaded.manifest.adapters)
            runner: Runner
            if group:
                runner = parallel.open_parallel(group, loaded.model, chosen.kv_budget)
            else:
                step = compiled.path_of(chosen.compiled, loaded.model, loaded.manifest) if chosen.compile else None
                runner = open_runner(loaded.model, chosen.kv_budget, step, chosen.compile, names)
            reason = f" ({runner.reason})" if runner.reason else ""
            print(f"runner: {runner.description}{reason}; checked in {time.monotonic() - started:.1f} s", flush=True)
            check = group.check if group else lambda: None
            return LoadedModel(loaded.model, loaded.tokenizer, runner, names, loaded.manifest.source, check)

        self.engine = Engine(open_model, chosen.bounds)
        self.places.watch()
        gc.freeze()  # what exists now stays, so no collection during a step has to look at it
        gc.enable()

    def healthcheck(self) -> bool:
        """Raise if this server has to be replaced; the error is part of the answer to a health check."""
        if problem := self.engine.problem or self.places.problem:
            raise RuntimeError(problem)
        return True

    @cog.streaming
    @cog.concurrent(max=64)
    async def predict(
        self,
        prompt: Optional[str] = Input(  # noqa: UP045 - every version of cog build can read Optional
            default=None,
            description="The text to answer or continue. Required unless messages or ops_batch_json is given.",
        ),
        system_prompt: str = Input(
            default="", description="Instructions for how the model should behave, if its chat template takes them."
        ),
        prompt_template: str = Input(
            default="",
            description="Text that contains {prompt} and optionally {system_prompt}. Empty: the model's chat template.",
        ),
        messages: Optional[str] = Input(  # noqa: UP045
            default=None,
            description='Replaces prompt: a conversation as a JSON list like [{"role": "user", "content": "Hello"}].',
        ),
        max_tokens: int = Input(default=512, ge=1, description="Maximum number of tokens to generate."),
        min_tokens: Optional[int] = Input(  # noqa: UP045
            default=None,
            ge=0,
            description="The answer does not end before this many tokens. Empty: what the model sets, or 0.",
        ),
        temperature: Optional[float] = Input(  # noqa: UP045
            default=None,
            ge=0.0,
            le=5.0,
            description="0 picks the most likely token, more gives varied text. Empty: what the model sets, or 0.",
        ),
        top_p: Optional[float] = Input(  # noqa: UP045
            default=None,
            ge=0.0,
            le=1.0,
            description="Sample from the likeliest tokens with this probability. Empty: what the model sets, or 1.",
        ),
        top_k: Optional[int] = Input(  # noqa: UP045
            default=None,
            ge=0,
            description="Sample from this many of the most likely tokens; 0 is all. Empty: what the model sets, or 0.",
        ),
        min_p: Optional[float] = Input(  # noqa: UP045
            default=None,
            ge=0.0,
            le=1.0,
            description="Sample from tokens with this share of the likeliest one's probability. Empty: the model's.",
        ),
        repetition_penalty: Optional[float] = Input(  # noqa: UP045
            default=None,
            ge=0.01,
            le=10.0,
            description="Above 1, tokens of prompt and answer become less likely. Empty: what the model sets, or 1.",
        ),
        presence_penalty: float = Input(
            default=0.0, ge=-5.0, le=5.0, description="Above 0, tokens of the answer so far become less likely."
        ),
        frequency_penalty: float = Input(
            default=0.0, ge=-5.0, le=5.0, description="The same, for each time that the answer holds the token."
        ),
        seed: Optional[int] = Input(  # noqa: UP045
            default=None, description="The same seed gives the same text. Empty: a random seed."
        ),
        stop_sequences: str = Input(
            default="",
            description='Stop before any of these texts: a JSON list like [", ", "END"], or texts separated by commas.',
        ),
        logit_bias: str = Input(
            default="",
            description='Token ids and biases as JSON, like {"42": -100}: -100 forbids a token, 100 allows only such.',
        ),
        choices: str = Input(
            default="",
            description='The answer is one of a JSON list like ["yes", "no"]. Excludes regex, json_schema and grammar.',
        ),
        regex: str = Input(default="", description="Regular expression that the whole answer matches, like [0-9]{4}."),
        json_schema: str = Input(
            default="",
            description='JSON Schema that the answer follows, like {"type": "array"}, or true for any JSON.',
        ),
        grammar: str = Input(
            default="", description="Grammar that the answer follows, in GBNF or in llguidance's Lark dialect."
        ),
        normalize: str = Input(
            default="sum",
            choices=["sum", "mean"],
            description="With up to 64 choices: compare the log-probabilities of the texts, or their means per token.",
        ),
        n: int = Input(
            default=1,
            ge=1,
            le=16,
            description="Number of completions, with seeds seed, seed + 1 and so on. Above 1, output cannot be text.",
        ),
        top_logprobs: int = Input(
            default=1,
            ge=0,
            description="With output lmtp or json: how many of the most likely tokens to report, by default up to 100.",
        ),
        prompt_logprobs: bool = Input(
            default=False, description="With output lmtp or json: also report log-probabilities of the prompt's tokens."
        ),
        output: str = Input(
            default="text",
            choices=["text", "lmtp", "json"],
            description="text: the text as it grows. lmtp: one line per token. json: one document at the end.",
        ),
        adapter: str = Input(
            default="",
            description="Name of the adapter that answers, of those beside the model. Empty: the model alone.",
        ),
        cache_salt: str = Input(
            default="",
            description="Predictions share computed prompts only with those that give the same text here.",
        ),
        allow_special_tokens: bool = Input(
            default=False,
            description="Special tokens in prompts and messages, such as <|im_end|>, are special, not plain text.",
        ),
        max_new_tokens: Optional[int] = Input(  # noqa: UP045
            default=None, ge=1, deprecated=True, description="The same as max_tokens, which other models call so."
        ),
        ops_batch_json: Optional[str] = Input(  # noqa: UP045
            default=None,
            description="JSON array of LMTP operations, as LMQL sends them. Replaces prompt; other inputs are ignored.",
        ),
    ) -> AsyncConcatenateIterator[str]:
        """Answer a prompt, or run a batch of LMTP operations."""
        from lmtp.completions import Completions, generate_of
        from lmtp.runners.model import Defaults

        started = time.monotonic()
        context = contextvars.copy_context()
        self.places.begin(context)
        given = {"prompt": prompt, "messages": messages, "ops_batch_json": ops_batch_json}
        both = [name for name, value in given.items() if value is not None]
        if len(both) != 1:
            raise RequestError(
                f"{' and '.join(both)}: give one of them." if both else "Give prompt, messages or ops_batch_json."
            )
        if max_new_tokens is not None:
            if max_tokens not in (512, max_new_tokens):
                raise RequestError("max_tokens and max_new_tokens differ; give max_tokens alone.")
            max_tokens = max_new_tokens
        operations: Sequence[Operation | Failure]
        completions: Completions | None = None
        engine, head = self.engine, self.engine.limits.head
        async with engine.preparing(started):
            if ops_batch_json is not None:
                operations = await engine.tokenizers.parse(
                    len(ops_batch_json), protocol.parse_batch, ops_batch_json, engine.longest_input
                )
            else:
                if messages is not None:
                    ids = await engine.tokenizers.converse(
                        messages, system_prompt, prompt_template, allow_special_tokens
                    )
                else:
                    ids = await engine.tokenizers.render(
                        prompt or "", system_prompt, prompt_template, allow_special_tokens
                    )
                # Choices are compared and masks filled as they are; only `generate` has defaults.
                defaults = Defaults() if head or choices else engine.defaults
                generate = await engine.tokenizers.parse(
                    sum(map(len, (logit_bias, choices, json_schema, stop_sequences))),
                    generate_of,
                    Encode if head else Generate,
                    ids,
                    defaults,
                    max_tokens=max_tokens,
                    min_tokens=min_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    top_k=top_k,
                    min_p=min_p,
                    repetition_penalty=repetition_penalty,
                    presence_penalty=presence_penalty,
                    frequency_penalty=frequency_penalty,
                    seed=seed,
                    stop_sequences=stop_sequences,
                    logit_bias=logit_bias,
                    choices=choices,
                    regex=regex,
                    json_schema=json_schema,
                    grammar=grammar,
                    top_logprobs=top_logprobs,
                    adapter=adapter,
                    cache_salt=cache_salt,
                )
                labels = head.labels if head else ()
                encoded = engine.limits.source is not None
                completions = Completions(
                    generate, engine.tokenizer, output, int(n), prompt_logprobs, normalize, labels, encoded
                )
                await completions.tokenize(engine.tokenizers, engine.limits.context)
                operations = completions.operations
            prediction = await engine.predict(operations, started)
        cancellation.when_cancelled(prediction.cancel)
        # Cog's runtime 0.23.1 streams output only from a plain generator, which it runs on a thread of its own. What an
        # async generator yields is sent at the end.
        chunks = self._chunks(prediction, completions, started, context)
        next(chunks)  # enters its `with`: from here on closing the generator ends the prediction
        return chunks

    def _chunks(
        self, prediction: "Prediction", completions: "Completions | None", started: float, context: contextvars.Context
    ) -> Generator[str, None, None]:
        """Yield an empty chunk, then the output: a chunk a step, or several if they are long.

        The runtime finds by ``context`` which prediction logs and metrics belong to.
        """
        first_token: float | None = None
        with self.places.hold(), prediction:
            yield ""
            for replies in prediction:
                if first_token is None:
                    first_token = time.monotonic() - started
                yield from _pieces(completions.add(replies) if completions else protocol.encode(replies))
            counters = prediction.counters
            if completions:
                check = self.engine.compiler.check
                end = completions.end(counters.reused_tokens, counters.computed_tokens, check)
                if prediction.cancelled:  # while the texts were checked
                    raise asyncio.CancelledError
                yield from _pieces(end)
        context.run(self._record, prediction, completions, first_token or 0.0, time.monotonic() - started)

    def _record(
        self, prediction: "Prediction", completions: "Completions | None", first_token: float, seconds: float
    ) -> None:
        counters = prediction.counters
        if completions and completions.constraint:
            finished = completions.finished and counters.unfinished_constraints == 0
            self.record_metric("constraint_finished", finished)
            if None not in completions.valid:
                self.record_metric("constraint_valid", all(completions.valid))
            if not finished:
                print("A text ended inside the constraint, at max_tokens or a stop sequence: it is not valid.")
            elif not all(completions.valid):
                print("A text ended as the constraint allows, but it is not known to be valid; see docs/protocol.md.")
        self.record_metric("input_token_count", completions.input_tokens if completions else counters.input_tokens)
        self.record_metric("output_token_count", counters.output_tokens)
        self.record_metric("reused_token_count", counters.reused_tokens)
        self.record_metric("computed_token_count", counters.computed_tokens)
        self.record_metric("drafted_token_count", counters.drafted_tokens)
        self.record_metric("accepted_token_count", counters.accepted_tokens)
        self.record_metric("step_count", counters.steps)
        self.record_metric("rows_per_step", round(counters.rows / max(counters.steps, 1), 2))
        self.record_metric("time_to_first_token", round(first_token, 4))
        self.record_metric("tokens_per_second", round(counters.output_tokens / seconds, 2))


def _pieces(chunk: str) -> Iterator[str]:
    """Cut what is too long for one chunk, at the ends of lines if they are near enough."""
    while chunk:
        end = len(chunk) if len(chunk) <= MAX_CHUNK else chunk.rfind("\n", 0, MAX_CHUNK) + 1 or MAX_CHUNK
        yield chunk[:end]
        chunk = chunk[end:]
