"""Environment variables: defaults, what they change, and what is refused."""

import pytest

from lmtp import settings
from lmtp.settings import Bounds, SettingsError

NAMES = (
    "MAX_SECONDS", "MAX_UNREAD_SECONDS", "MAX_UNREAD_MB", "MAX_TOP_LOGPROBS", "MAX_PROMPT_BYTES", "TOKENIZER_THREADS",
    "PREFIX_REUSE", "KV_CACHE_GB", "COMPILE", "PARALLEL",
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_without_variables_every_bound_has_its_default() -> None:
    assert settings.read().bounds == Bounds()
    assert settings.read().kv_budget is None


def test_every_bound_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    values = ("0", "5.5", "1", "7", "1000", "3", "salted")
    for name, value in zip(NAMES, values, strict=False):
        monkeypatch.setenv(name, value)
    assert settings.read().bounds == Bounds(
        prefix_reuse="salted",
        max_seconds=0,
        max_unread_seconds=5.5,
        max_unread_bytes=2**20,
        max_top_logprobs=7,
        max_prompt_bytes=1000,
        tokenizer_threads=3,
    )


def test_zero_is_no_limit_and_the_default_only_holds_for_what_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ("MAX_SECONDS", "MAX_UNREAD_SECONDS", "MAX_UNREAD_MB", "MAX_TOP_LOGPROBS", "MAX_PROMPT_BYTES")
    for name in limits:
        monkeypatch.setenv(name, "0")
    bounds = settings.read().bounds
    assert bounds == Bounds(
        max_seconds=0, max_unread_seconds=0, max_unread_bytes=0, max_top_logprobs=0, max_prompt_bytes=0
    )
    for name in limits:
        monkeypatch.setenv(name, "-1")
        with pytest.raises(SettingsError, match=f"{name} is '-1'; use a number .*; 0 is no limit"):
            settings.read()
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *((name, "many", f"{name} is 'many'; use ") for name in NAMES),
        *((name, "-1", f"{name} is '-1'; use ") for name in NAMES),
        ("MAX_SECONDS", "nan", "use a number of seconds; 0 is no limit"),
        ("MAX_SECONDS", "inf", "use a number of seconds; 0 is no limit"),
        ("PREFIX_REUSE", "private", "use one of shared, salted, off"),
        ("KV_CACHE_GB", "0", "use a number of gigabytes above 0"),
    ],
)
def test_an_invalid_value_is_refused_with_its_variable_and_what_is_valid(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=message):
        settings.read()
