"""The Cog predictor: a language model behind one call, with token-level control.

A prediction is either a prompt or a batch of LMTP operations; both become operations of the same generation loop.
"""

import gc

gc.disable()  # until setup is done: looking for garbage while modules are loaded takes a tenth of the start

import contextvars
import time
from collections.abc import Generator, Sequence
from importlib.metadata import version
from typing import Optional

import cog
from cog import AsyncConcatenateIterator, BasePredictor, Input

from lmtp import cancellation, protocol, settings, text
from lmtp.completions import Completions
from lmtp.engine.engine import Engine, OpenModel
from lmtp.prediction import Prediction
from lmtp.protocol import Failure, Generate, Operation, RequestError
from lmtp.runners import compiled
from lmtp.runners.runner import open_runner
from lmtp.weights import load as weights

cancellation.install()


class Predictor(BasePredictor):
    """Serves the model in ``weights/``."""

    def setup(self) -> None:
        """Load the weights and start the engine."""
        chosen = settings.read()

        def open_model() -> OpenModel:
            loaded = weights.load(chosen.weights, dtype=chosen.dtype)
            dtype = str(loaded.dtype).removeprefix("torch.")
            versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
            print(
                f"{loaded.manifest.source}: {dtype} on {loaded.device}, loaded in {loaded.seconds:.1f} s; {versions}",
                flush=True,
            )
            started = time.monotonic()
            step = compiled.path_of(chosen.compiled, loaded.model, loaded.manifest) if chosen.compile else None
            runner = open_runner(loaded.model, chosen.kv_budget, step, graphs=chosen.compile)
            reason = f" ({runner.reason})" if runner.reason else ""
            print(f"runner: {runner.description}{reason}; checked in {time.monotonic() - started:.1f} s", flush=True)
            return OpenModel(loaded.model, loaded.tokenizer, runner)

        self.engine = Engine(open_model)
        gc.freeze()  # what exists now stays, so no collection during a step has to look at it
        gc.enable()

    @cog.streaming
    @cog.concurrent(max=64)
    async def predict(
        self,
        prompt: Optional[str] = Input(  # noqa: UP045 - cog build reads this file, and knows Optional in every version
            default=None, description="The text to answer or continue. Give this or ops_batch_json."
        ),
        system_prompt: str = Input(
            default="", description="How the model should behave, for models whose template has a place for it."
        ),
        prompt_template: str = Input(
            default="",
            description="Text with {prompt} and maybe {system_prompt} in it. Empty: the model's own chat template.",
        ),
        max_tokens: int = Input(default=512, ge=1, description="New tokens to generate at most."),
        temperature: float = Input(
            default=0.0, ge=0.0, le=5.0, description="0 always takes the most likely token; higher is more varied."
        ),
        top_p: float = Input(
            default=1.0,
            ge=0.0,
            le=1.0,
            description="Draw only from the most likely tokens that together have this probability. 1 is off.",
        ),
        top_k: int = Input(
            default=0, ge=0, description="Draw only from this many of the most likely tokens. 0 is off."
        ),
        seed: Optional[int] = Input(  # noqa: UP045
            default=None, description="The same seed gives the same text. Empty: a new one every time."
        ),
        stop_sequences: str = Input(
            default="",
            description="Where to stop: one text, or several as a JSON list of strings. The output ends before them.",
        ),
        logit_bias: str = Input(
            default="",
            description="JSON object from token id to number: -100 forbids a token, 100 allows only such tokens.",
        ),
        choices: str = Input(
            default="", description="The answer is one of these texts: a JSON list of strings. One constraint at most."
        ),
        regex: str = Input(default="", description="The answer matches this regular expression as a whole."),
        json_schema: str = Input(
            default="", description="The answer is JSON that this JSON Schema allows; true: any JSON."
        ),
        grammar: str = Input(
            default="", description="The answer follows this grammar, in the Lark dialect of llguidance or in GBNF."
        ),
        best_of_choices: bool = Input(
            default=False,
            description="With choices: compare the probabilities of the whole texts and answer with the likeliest.",
        ),
        n: int = Input(
            default=1,
            ge=1,
            le=16,
            description="Completions of the prompt, with seeds from seed on. Not with output text.",
        ),
        top_logprobs: int = Input(
            default=1,
            ge=0,
            le=1000,
            description="With output lmtp and json: how many likely tokens to report with each.",
        ),
        prompt_logprobs: bool = Input(
            default=False, description="With output lmtp and json: log-probabilities of the tokens of the prompt, too."
        ),
        output: str = Input(
            default="text",
            choices=["text", "lmtp", "json"],
            description="text: as it grows. lmtp: a line for every token. json: all of it as one document at the end.",
        ),
        ops_batch_json: Optional[str] = Input(  # noqa: UP045
            default=None,
            description="A JSON array of LMTP operations, as LMQL sends it. The inputs above are then not used.",
        ),
    ) -> AsyncConcatenateIterator[str]:
        """Answer a prompt, or run a batch of LMTP operations."""
        started = time.monotonic()
        if (prompt is None) == (ops_batch_json is None):
            raise RequestError(f"Give prompt or ops_batch_json, {'not both' if prompt is not None else 'one of them'}.")
        operations: Sequence[Operation | Failure]
        completions: Completions | None = None
        if ops_batch_json is not None:
            operations = protocol.parse_batch(ops_batch_json)
        else:
            tokenizer = self.engine.tokenizer
            generate = Generate(  # the runtime lets 3.0 pass for an integer
                stream_id=0,
                prompt=await self.engine.tokenize(
                    text.render_prompt, tokenizer, prompt or "", system_prompt, prompt_template
                ),
                max_tokens=int(max_tokens),
                temperature=temperature,
                top_p=max(top_p, 1e-9),  # 0 keeps the most likely token alone
                top_k=int(top_k),
                seed=None if seed is None else int(seed),
                stop=text.parse_stop_sequences(stop_sequences),
                logit_bias=protocol.parse_logit_bias(logit_bias),
                choices=protocol.parse_choices(choices),
                regex=regex or None,
                json_schema=protocol.parse_json_schema(json_schema),
                grammar=grammar or None,
                top_logprobs=int(top_logprobs),
                text=True,
            )
            completions = Completions(generate, tokenizer, output, int(n), prompt_logprobs, best_of_choices)
            operations = completions.operations
        prediction = await self.engine.predict(operations)
        cancellation.when_cancelled(prediction.cancel)
        # Cog's runtime 0.23 sends what comes, as it comes, from a plain generator, which it runs on a thread of the
        # prediction's own; what an async generator yields it collects and sends at the end.
        chunks = self._chunks(prediction, completions, started, contextvars.copy_context())
        next(chunks)  # from here on whatever ends it ends the prediction
        return chunks

    def _chunks(
        self, prediction: Prediction, completions: Completions | None, started: float, context: contextvars.Context
    ) -> Generator[str, None, None]:
        """The output, after one empty piece; one at most for every step. By the context the runtime knows whose logs
        and metrics they are."""
        first_token: float | None = None
        with prediction:
            yield ""
            for replies in prediction:
                if first_token is None:
                    first_token = time.monotonic() - started
                if chunk := completions.add(replies) if completions else protocol.encode(replies):
                    yield chunk
        counters = prediction.counters
        if completions and (end := completions.end(counters.reused_tokens, counters.computed_tokens)):
            yield end
        context.run(self._record, prediction, completions, first_token or 0.0, time.monotonic() - started)

    def _record(
        self, prediction: Prediction, completions: Completions | None, first_token: float, seconds: float
    ) -> None:
        counters = prediction.counters
        if completions and completions.constraint:
            unfinished = counters.unfinished_constraints
            self.record_metric("constraint_finished", unfinished == 0)
            if unfinished:
                print(f"{unfinished} ended inside the constraint, at max_tokens or a stop sequence: not valid text.")
        self.record_metric("input_token_count", counters.input_tokens)
        self.record_metric("output_token_count", counters.output_tokens)
        self.record_metric("reused_token_count", counters.reused_tokens)
        self.record_metric("computed_token_count", counters.computed_tokens)
        self.record_metric("drafted_token_count", counters.drafted_tokens)
        self.record_metric("accepted_token_count", counters.accepted_tokens)
        self.record_metric("step_count", counters.steps)
        self.record_metric("rows_per_step", round(counters.rows / max(counters.steps, 1), 2))
        self.record_metric("time_to_first_token", round(first_token, 4))
        self.record_metric("tokens_per_second", round(counters.output_tokens / seconds, 2))
