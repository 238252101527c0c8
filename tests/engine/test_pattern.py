"""What other dialects of regular expressions have and Rust's reads as something else is refused; the rest is not."""

import pytest

from lmtp.engine.pattern import check_pattern
from lmtp.protocol import RequestError


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a*+b", "f: possessive quantifiers are not supported: '*+' at character 2, in 'a*+b'"),
        ("(ab)++", "'++' at character 5"),
        ("x?+", "'?+' at character 2"),
        (r"\d{2,3}+", "'{2,3}+' at character 3"),
        ("[a-z&&[^b]]", "f: operations on character classes are not supported: '&&' at character 5"),
        ("[a-c--b]", "'--' at character 5"),
        ("[a~~b]", "'~~' at character 3"),
        ("[a[b]]", "f: classes within classes are not supported: '[' at character 3"),
        ("a\\", "f: ends with a single backslash"),
        ("[a\\", "f: ends with a single backslash"),
    ],
)
def test_what_would_be_misread_is_refused_with_its_place(pattern: str, message: str) -> None:
    with pytest.raises(RequestError) as refused:
        check_pattern(pattern, "f")
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("pattern", "negated"),
    [
        (r"a+\+*?\\", []),
        (r"\p{Greek}+x{2}y{1,}?\{2}\+", []),
        ("(?:a)+(?P<name>b)?(?i)c", []),
        ("[]a][^]b][[:alpha:]_][a&b~-]", [6]),
        (r"[^\]&\-]|[\[^]|\[^", [2]),
        ("{}+", []),
    ],
)
def test_all_else_is_left_alone(pattern: str, negated: list[int]) -> None:
    assert check_pattern(pattern, "f") == negated
