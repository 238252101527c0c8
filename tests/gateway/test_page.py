"""The token inspector in headless Chromium, with axe-core as the judge of its accessibility."""

import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests import node
from tests.server import Server


@pytest.fixture(scope="module")
def seen(gateway: Server) -> Any:
    """What page.js saw, who uses the page once for all tests."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("chromium is not installed")
    packages = node.installed("playwright-core@1.65.1", "axe-core@4.14.1")
    return node.run(packages, str(Path(__file__).with_name("page.js")), gateway.url, chromium)


def test_axe_core_finds_no_error(seen: Any) -> None:
    assert seen["violations"] == []


def test_nothing_is_fetched_from_elsewhere(seen: Any, gateway: Server) -> None:
    hosts = {urlsplit(url).netloc for url in seen["requests"] if not url.startswith("data:")}
    assert hosts == {urlsplit(gateway.url).netloc}
    assert seen["errors"] == []  # the content security policy reports to the console


def test_each_token_of_prompt_and_answer_is_shown(seen: Any) -> None:
    assert "".join(seen["answer"]) == "The capital of France is"
    assert "What is the capital of France?" in "".join(seen["prompt"])
    assert seen["label"].startswith("The, ")
    assert seen["label"].endswith("%")
    assert seen["shades"] > 1


def test_a_token_chosen_by_keyboard_shows_its_alternatives(seen: Any) -> None:
    assert seen["focused"] == seen["spelt"] == " of"
    percents = [float(text.strip("<%")) for text in seen["bars"]]
    assert len(percents) >= 8
    assert 99 < sum(percents) < 101


def test_an_alternative_continues_from_there_and_nothing_is_computed_twice(seen: Any) -> None:
    assert "".join(seen["branch"][:2]) == "The capital"
    assert seen["branch"][2] == seen["alternative"].replace("·", " ")
    assert len(seen["branch"]) == 3 + 5
    assert seen["reused"] == seen["input"] - 1
    assert seen["back"] == seen["answer"]


def test_choices_are_bars_most_likely_first(seen: Any) -> None:
    assert seen["choices"] == ["Paris", "Rome"]
    assert seen["chosen"] == ["Paris"]


def test_an_error_is_shown_in_the_predictors_words(seen: Any) -> None:
    assert seen["error"].startswith("regex: ")


def test_a_text_that_left_its_constraint_says_so(seen: Any) -> None:
    assert (seen["constrained"], seen["freed"]) == (False, True)


def test_a_model_that_was_busy_or_down_is_asked_again_by_the_next_run(seen: Any) -> None:
    assert seen["busy"] == "The target is busy; ask again later."
    assert seen["down"] == "The gateway answered with status 502."
    assert seen["up"] == [False, "demo"]


def test_a_phone_gets_a_sheet_and_no_sideways_scrolling(seen: Any) -> None:
    assert seen["sheet"] == "fixed"
    assert seen["overflow"] <= 0


def test_the_page_forbids_what_it_does_not_need(gateway: Server) -> None:
    response = httpx.get(gateway.url)
    policy = response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "://" not in response.text.replace("http://www.w3.org/2000/svg", "")
