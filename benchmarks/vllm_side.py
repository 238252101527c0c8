"""vLLM in a process, and usually a virtual environment, of its own."""

import time
from typing import Any

from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
from vllm.sampling_params import StructuredOutputsParams  # type: ignore[import-not-found]


class VLLM:
    """The model as vLLM serves it; no token ends a sequence and no text is made of them."""

    def __init__(self, weights: str, dtype: str) -> None:
        self._llm = LLM(model=weights, dtype=dtype, max_model_len=2048)

    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict[str, float]:
        """Greedy, all prompts at once. Seconds and new tokens."""
        options = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        outputs = self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], options, use_tqdm=False)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens": sum(len(output.outputs[0].token_ids) for output in outputs)}

    def structured(
        self,
        prompts: list[list[int]],
        schema: dict[str, Any],
        max_tokens: int,
        temperature: float,
        seeds: list[int],
    ) -> dict[str, Any]:
        """JSON by a schema, all prompts at once, a seed each; here text is made. Seconds, new tokens and texts."""
        options = [
            SamplingParams(
                temperature=temperature,
                seed=seed,
                max_tokens=max_tokens,
                structured_outputs=StructuredOutputsParams(json=schema),
            )
            for seed in seeds
        ]
        started = time.perf_counter()
        outputs = self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], options, use_tqdm=False)
        seconds = time.perf_counter() - started
        return {
            "seconds": seconds,
            "tokens": sum(len(output.outputs[0].token_ids) for output in outputs),
            "texts": [output.outputs[0].text for output in outputs],
        }
