"""vLLM as a peer, usually in a virtual environment of its own."""

import time
from typing import Any

from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
from vllm.sampling_params import StructuredOutputsParams  # type: ignore[import-not-found]


class VLLM:
    """The model in vLLM."""

    def __init__(self, weights: str, dtype: str) -> None:
        self._llm = LLM(model=weights, dtype=dtype, max_model_len=2048)

    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """Decode greedily, all prompts at once, without an end of sequence and without detokenizing."""
        options = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        return self._timed(prompts, [options] * len(prompts))

    def structured(
        self,
        prompts: list[list[int]],
        schema: dict[str, Any],
        max_tokens: int,
        temperature: float,
        seeds: list[int],
    ) -> dict[str, Any]:
        """Generate JSON that follows a schema, all prompts at once, with a seed for each."""
        constraint = StructuredOutputsParams(json=schema)
        common = {"temperature": temperature, "max_tokens": max_tokens, "structured_outputs": constraint}
        return self._timed(prompts, [SamplingParams(seed=seed, **common) for seed in seeds])

    def _timed(self, prompts: list[list[int]], options: list[Any]) -> dict[str, Any]:
        """Seconds, new tokens, and texts."""
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        started = time.perf_counter()
        outputs = [output.outputs[0] for output in self._llm.generate(inputs, options, use_tqdm=False)]
        return {
            "seconds": time.perf_counter() - started,
            "tokens": sum(len(output.token_ids) for output in outputs),
            "texts": [output.text for output in outputs],
        }
