"""Which keywords of `from_pretrained` a manifest may hold: checked by name before a model's weights are fetched."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmtp.weights.manifest import WeightsError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""What `dtype` may be."""

KEYWORDS = (
    "attn_implementation",
    "device_map",
    "dtype",
    "experts_implementation",
    "key_mapping",
    "max_memory",
    "quantization_config",
)
"""Keywords of `from_pretrained` besides the configuration's own."""

OWN_OPTIONS = {"revision": "--revision", "trust_remote_code": "--trust-remote-code", "load_in": "--load-in"}
"""Names that have an option of their own."""

ROPE = ("rope_scaling", "rope_parameters")


def parse(pairs: list[str]) -> dict[str, Any]:
    """Read arguments given as NAME=JSON. Raises WeightsError for a text of another form and for names with an option
    of their own."""
    arguments: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise WeightsError(f"--model-arg {pair}: give NAME=JSON, such as attn_implementation='\"eager\"'.")
        if name in OWN_OPTIONS:
            raise WeightsError(f"--model-arg {name}: use {OWN_OPTIONS[name]} instead.")
        try:
            arguments["dtype" if name == "torch_dtype" else name] = json.loads(value)
        except ValueError:
            raise WeightsError(
                f"--model-arg {name}: {value} is no JSON; a text is written '{name}=\"text\"'."
            ) from None
    return arguments


def configuration(directory: Path, model_args: Mapping[str, Any], source: str, with_code: str) -> PreTrainedConfig:
    """The directory's configuration with the arguments that change it.

    ``with_code`` is the command that fetches the model with its own code. Raises WeightsError if there is none that
    Transformers knows, or if an argument's name or value is unknown.
    """
    from transformers import AutoConfig

    trusted = model_args.get("trust_remote_code", False)
    try:
        config: Any = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trusted)
        changes = {name: value for name, value in model_args.items() if name not in (*KEYWORDS, *OWN_OPTIONS)}
        text = config.get_text_config(decoder=True)
        _check_names(changes, config, text, source)
        if changes:
            raw = json.loads((directory / "config.json").read_bytes())
            inner = next((key for key in config.sub_configs if getattr(config, key) is text), None)
            for name, value in changes.items():
                for part, holder in ((config, raw), (text, raw.setdefault(inner, {}) if inner else raw)):
                    if hasattr(part, name):
                        _change(holder, name, value, part)
            config = type(config).from_dict(raw)
    except WeightsError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise WeightsError(f"{source} runs code of its own: if you trust it, run `{with_code}`.") from error
        raise WeightsError(
            f"Transformers cannot read the config.json of {source}: {first_line(error)[:200]}"
        ) from error
    _check_values(model_args)
    _check_kernels(config, model_args, source)
    return config


def _check_names(changes: Mapping[str, Any], config: Any, text: Any, source: str) -> None:
    for name in changes:
        if (
            not (hasattr(config, name) or hasattr(text, name))
            or name.startswith("_")
            or callable(getattr(text, name, 0))
        ):
            known = sorted(
                each for each in {*KEYWORDS, *ROPE, *text.to_dict(), *config.to_dict()} if not each.startswith("_")
            )
            nearest = difflib.get_close_matches(name, known, 1)
            hint = (
                f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(KEYWORDS)} and its config.json's."
            )
            raise WeightsError(f"{source} takes no argument {name!a:.60}: {hint}")


def _check_values(model_args: Mapping[str, Any]) -> None:
    if model_args.get("dtype", "auto") not in DTYPES:
        raise WeightsError(f"The argument dtype is {model_args['dtype']!r}: choose one of {', '.join(DTYPES)}.")


def _check_kernels(config: Any, model_args: Mapping[str, Any], source: str) -> None:
    """Raise WeightsError for an implementation that Transformers would import from a repository of kernels."""
    for name in ("attn_implementation", "experts_implementation"):
        chosen = str(model_args.get(name, getattr(config, f"_{name}", None)))
        if "/" in chosen:
            raise WeightsError(
                f"{source} names {name} {chosen!a:.60}, which is code of a repository: give --model-arg"
                f" '{name}=\"eager\"'."
            )


def _change(holder: dict[str, Any], name: str, value: Any, part: Any) -> None:
    """Change one entry of a config.json. The base frequency of a changed rotary embedding stays."""
    if name in ROPE and isinstance(value, dict):
        before = getattr(part, "rope_parameters", None) or {}
        kept = {key: before[key] for key in ("rope_theta", "partial_rotary_factor") if key in before}
        for other in ROPE:
            holder.pop(other, None)
        name, value = "rope_parameters", kept | value
    holder[name] = value
