"""The protocol's lines: accepted and refused operations, error messages, encoded replies."""

import contextlib
import json

import msgspec
import pytest

from lmtp import protocol
from lmtp.protocol import (
    BATCH_LIMIT,
    Failure,
    Generate,
    Info,
    ModelInfo,
    RequestError,
    Score,
    Token,
    encode,
    finite,
    generate,
    parse_batch,
    parse_choices,
    parse_json_schema,
    parse_logit_bias,
)


def only(payload: str) -> Failure:
    (failure,) = parse_batch(payload)
    assert isinstance(failure, Failure)
    return failure


def test_a_batch_from_lmql_is_parsed_with_its_defaults() -> None:
    batch = parse_batch(
        '[["GENERATE", {"stream_id": 1, "prompt": [1, 2], "model": "m", "logit_bias": {"7": 100}, "length_penalty": 1.0}],'
        ' ["SCORE", {"stream_id": 2, "prompt": [], "scored": [5], "model": "m"}],'
        ' ["MODEL_INFO", {"stream_id": "three", "model": "m", "data": {"model": "m"}}]]'
    )
    assert batch == [
        Generate(stream_id=1, prompt=[1, 2], model="m", logit_bias={7: 100.0}, length_penalty=1.0),
        Score(stream_id=2, prompt=[], scored=[5], model="m"),
        ModelInfo(stream_id="three", model="m", data=msgspec.Raw(b'{"model": "m"}')),
    ]
    generate = batch[0]
    assert isinstance(generate, Generate)
    assert (generate.max_tokens, generate.temperature, generate.top_logprobs) == (32, 0.0, 1)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ("{", "must be a JSON array"),
        ("[1", "is not JSON"),
        ("{}", "must be a JSON array of operations"),
        ("[]", "holds no operations"),
        (json.dumps([["MODEL_INFO", {"stream_id": i}] for i in range(BATCH_LIMIT + 1)]), "takes at most 256"),
        ('[["GENERATE", {"stream_id": 1, "prompt": [1], "temperature": NaN}] 5]', "is not JSON"),
        ('[["GENERATE", {"stream_id": 1, "prompt": NaN}] ["MODEL_INFO", {"stream_id": 2}]]', "is not JSON"),
        ('[["GENERATE", {"stream_id": 1, "prompt": NaN}],, ["MODEL_INFO", {"stream_id": 2}]]', "is not JSON"),
        ('[["GENERATE", {"stream_id": 1, "prompt": NaN}],]', "is not JSON"),
        ('7, [["GENERATE", {"stream_id": 1, "prompt": NaN}]]', "must be a JSON array"),
        ('[["GENERATE", {"stream_id": 1, "prompt": NaN}]}', "is not JSON"),
        ('{["GENERATE", {"stream_id": 1, "prompt": NaN}]]', "must be a JSON array"),
        (f"[{', '.join(['[NaN]'] * (BATCH_LIMIT + 1))}]", "holds more than 256 operations"),
    ],
)
def test_input_without_a_stream_to_answer_fails_the_prediction(payload: str, message: str) -> None:
    with pytest.raises(RequestError, match=message.replace("[", r"\[")):
        parse_batch(payload)


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        ('["GENERATE", {"stream_id": 1}]', "missing required field prompt"),
        ('["GENERATE", {"stream_id": 1, "prompt": [1, "a"]}]', "GENERATE prompt[1]: expected int, got str."),
        ('["GENERATE", {"stream_id": 1, "prompt": [1, -2]}]', "GENERATE prompt[1]: expected int >= 0."),
        ('["GENERATE", {"stream_id": 1, "prompt": [1], "max_tokens": 0}]', "GENERATE max_tokens: expected int >= 1."),
        ('["GENERATE", {"stream_id": 1, "prompt": [1], "max_tokens": 1.5}]', "max_tokens: expected int"),
        ('["GENERATE", {"stream_id": 1, "prompt": [1], "tempature": 1}]', "no field 'tempature'; did you mean 'temperature'?"),
        ('["GENERATE", {"stream_id": 1, "prompt": [1], "logit_bias": {"a": 1}}]', "GENERATE logit_bias: expected int, got str."),
        ('["GENERATE", {"stream_id": 1, "prompt": [1], "stop": [""]}]', "stop[0]: expected str of length >= 1."),
        ('["GENERATE", {"stream_id": 1, "prompt": [1], "top_k": 9223372036854775808}]', "GENERATE top_k: expected int"),
        ('["GENERATE", {"stream_id": 1, "prompt": [1], "temperature": 1e39}]', "temperature: expected float <= 10000"),
        ('["SCORE", {"stream_id": 1, "prompt": [1]}]', "missing required field scored"),
        ('["GENRATE", {"stream_id": 1}]', "unknown operation 'GENRATE'"),
    ],
)  # fmt: skip
def test_an_invalid_operation_fails_its_own_stream_only(operation: str, message: str) -> None:
    failure, other = parse_batch(f'[{operation}, ["MODEL_INFO", {{"stream_id": 2}}]]')
    assert isinstance(failure, Failure)
    assert failure.stream_id == 1
    assert message in failure.error
    assert other == ModelInfo(stream_id=2)


def test_an_unknown_operation_names_the_nearest_known_one() -> None:
    assert "did you mean 'GENERATE'?" in only('[["GENRATE", {"stream_id": 1}]]').error


def test_a_malformed_operation_is_named_by_its_index() -> None:
    failure, _ = parse_batch('[7, ["MODEL_INFO", {"stream_id": 1}]]')
    assert failure == Failure(stream_id=None, error="operation 0: must be [name, {fields}].", kind="MSG")


def test_operations_that_share_a_stream_id_get_one_error() -> None:
    failure, other = parse_batch(
        '[["GENERATE", {"stream_id": 1, "prompt": [1]}], ["SCORE", {"stream_id": 1, "prompt": [1], "scored": [1]}],'
        ' ["GENERATE", {"stream_id": 2, "prompt": [1]}]]'
    )
    assert isinstance(failure, Failure)
    assert "stream_id 1 is used by 2 operations" in failure.error
    assert other.stream_id == 2


def test_replies_are_encoded_as_lines_of_strict_json() -> None:
    token = Token(token=7042, stream_id=7, logprob=-0.283, finish_reason=None, top_logprobs={7042: -0.283, 260: -2.589})
    lines = encode(
        [token, Info(stream_id=3, model_info={"model": "m"}), Failure(stream_id=4, error="no", kind="TOKEN")]
    )
    assert lines.endswith("\n")
    commands, objects = zip(*(line.split(" ", 1) for line in lines.splitlines()), strict=True)
    assert commands == ("TOKEN", "MSG", "TOKEN")
    assert [json.loads(text) for text in objects] == [
        {
            "token": 7042,
            "stream_id": 7,
            "logprob": -0.283,
            "finish_reason": None,
            "top_logprobs": {"7042": -0.283, "260": -2.589},
        },
        {"stream_id": 3, "model_info": {"model": "m"}},
        {"stream_id": 4, "error": "no"},
    ]


def test_text_never_breaks_a_line() -> None:
    token = Token(token=1, stream_id="a\nb", logprob=0.0, finish_reason="stop", text='line\nline\u2028\x85\u2029"')
    line = encode([token])
    assert len(line.splitlines()) == 1
    assert json.loads(line.split(" ", 1)[1])["text"] == 'line\nline\u2028\x85\u2029"'


def test_a_logprob_is_always_a_valid_json_number() -> None:
    assert finite(float("-inf")) == pytest.approx(-3.4e38, rel=0.01)
    assert str(finite(-0.0)) == "0.0"


def test_logit_bias_is_parsed_or_refused_with_an_example() -> None:
    assert parse_logit_bias(' {"3": -100} ') == {3: -100.0}
    assert parse_logit_bias("") is None
    with pytest.raises(RequestError, match="logit_bias must be a JSON object like"):
        parse_logit_bias("[3]")


DEEP = '{"a": ' * 5000 + "1" + "}" * 5000


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (f'["GENERATE", {{"json_schema": {DEEP}, "stream_id": 1, "prompt": [1]}}]', "nested too deep"),
        (f'["MODEL_INFO", {{"stream_id": 1, "data": {"[" * 100_000 + "]" * 100_000}}}]', "nested too deep"),
        ('["GENERATE", {"stream_id": 1, "prompt": "\\ud800 [{ \\" "}]', "lone surrogate"),
        ('["GENERATE", {"stream_id": 1, "prompt": [1], "stop": ["\\udfff"]}]', "lone surrogate"),
        ('["GENERATE", {"stream_id": 1, "prompt": "\ud800"}]', "lone surrogate"),
        ('["GENERATE", {"stream_id": 1, "prompt": [1], "temperature": NaN}]', "JSON has no NaN"),
        (
            '["GENERATE", {"stream_id": 1, "prompt": "a, [", "temperature": -Infinity}]',
            "JSON has no NaN and no Infinity",
        ),
        ('["GENERATE", {"stream_id": 1, "prompt": [1,, 2]}]', "malformed"),
        ('["GENERATE", {"stream_id": 1, "prompt": [1}]}', "malformed"),
    ],
)
def test_what_the_json_parser_gives_up_ends_that_stream_and_no_other(operation: str, message: str) -> None:
    failure, other, last = parse_batch(
        f'[{operation} , ["MODEL_INFO", {{"stream_id": 2}}], ["MODEL_INFO", {{"stream_id": 3}}]]'
    )
    assert isinstance(failure, Failure)
    assert failure.stream_id == 1
    assert message in failure.error
    assert (other, last) == (ModelInfo(stream_id=2), ModelInfo(stream_id=3))


@pytest.mark.parametrize("payload", [f"[7, {DEEP}", f"{DEEP}", '["\\ud800"', '["\\ud800"] 1', '[{"a": "\\ud800"} x]'])
def test_what_is_no_array_is_refused_however_deep_it_is_nested(payload: str) -> None:
    with pytest.raises(RequestError, match=r"must be a JSON array|is not JSON"):
        parse_batch(payload)


@pytest.mark.parametrize(
    ("field", "limit"),
    [
        ('"seed": 9223372036854775808', "seed: expected int <= 9223372036854775807"),
        ('"seed": -9223372036854775809', "seed: expected int >= -9223372036854775808"),
        ('"top_k": 9223372036854775808', "top_k: expected int <= 2147483647"),
        ('"max_tokens": 9223372036854775808', "max_tokens: expected int <= 2147483647"),
        ('"min_tokens": 92233720368547758080', "min_tokens: expected int <= 2147483647"),
        ('"logit_bias": {"9223372036854775808": 1}', "logit_bias: expected int <= 2147483647"),
        ('"prompt": [9223372036854775808]', "prompt[0]: expected int <= 2147483647"),
        ('"stop": ["' + "x" * 1001 + '"]', "stop[0]: expected str of length <= 1000"),
        ('"stop": [' + ", ".join(f'"{i}"' for i in range(65)) + "]", "stop: expected array of length <= 64"),
        ('"cache_salt": "' + "x" * 257 + '"', "cache_salt: expected str of length <= 256"),
    ],
)
def test_a_value_over_a_limit_is_refused_with_its_field_and_the_limit(field: str, limit: str) -> None:
    prompt = "" if "prompt" in field else '"prompt": [1], '
    assert only(f'[["GENERATE", {{"stream_id": 1, {prompt}{field}}}]]').error == f"GENERATE {limit}."


def test_values_that_did_not_come_as_json_have_the_same_limits() -> None:
    assert generate(stream_id=0, prompt=[1], top_k=3) == Generate(stream_id=0, prompt=[1], top_k=3)
    with pytest.raises(RequestError, match=r"^top_k: expected int <= 2147483647.$"):
        generate(stream_id=0, prompt=[1], top_k=2**63)
    with pytest.raises(RequestError, match=r"^seed: expected int <= 9223372036854775807.$"):
        generate(stream_id=0, prompt=[1], seed=2**63)


NAME = "a\n\x1b[31m" + "x" * 100_000


@pytest.mark.parametrize(
    "operation",
    [
        [NAME, {"stream_id": 1}],
        ["GENERATE", {"stream_id": 1, "prompt": [1], NAME: 1}],
        ["GENERATE", {"stream_id": NAME, "prompt": [1]}],
        ["GENERATE", {"stream_id": 1, "prompt": [1], "logit_bias": {NAME: 1}}],
    ],
)
def test_an_error_quotes_a_long_name_in_part_and_on_one_line(operation: list[object]) -> None:
    failure = only(json.dumps([operation]))
    assert len(failure.error) < 250
    assert failure.error.isprintable()
    assert len(encode([failure])) < 400


def test_control_characters_of_a_request_do_not_reach_the_log() -> None:
    error = RequestError("no such thing: a\r\nFAKE LOG LINE\x1b[31m\u2028\ud800 é 日本")
    assert str(error) == r"no such thing: a\r\nFAKE LOG LINE\x1b[31m\u2028\ud800 é 日本"


def test_biases_of_one_batch_are_counted_and_refused_over_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_BIASES", 5)
    batch = [["GENERATE", {"stream_id": i, "prompt": [1], "logit_bias": {"1": 1, "2": 2, "3": 3}}] for i in range(2)]
    first, second = parse_batch(json.dumps(batch))
    assert isinstance(first, Generate)
    assert isinstance(second, Failure)
    assert "logit_bias: the batch has more than 5 entries" in second.error


def test_a_batch_has_a_limit_in_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_BATCH_BYTES", 40)
    with pytest.raises(RequestError, match="ops_batch_json has 48 characters; 40 is the limit"):
        parse_batch('[["GENERATE", {"stream_id": 1, "prompt": [1]}]] ')


def test_more_token_ids_than_the_context_are_not_even_parsed() -> None:
    def op(name: str, fields: str) -> str:
        return f'["{name}", {{"stream_id": 1, {fields}}}]'

    ids = '["no id"' + ", 7" * 8 + "]"  # parsed, it would be another error
    for name, fields in (
        ("GENERATE", f'"prompt": {ids}'),
        ("GENERATE", f'"prompt": [1], "target": {ids}'),
        ("SCORE", f'"prompt": [1], "scored": {ids}'),
    ):
        (failure,) = parse_batch(f"[{op(name, fields)}]", max_ids=8)
        assert isinstance(failure, Failure)
        assert failure.error.endswith(": 9 token ids; the model's context is 8.")
    prompt = '"prompt": '
    for fits in ("[1, 2, 3, 4, 5, 6, 7, 8]", '"a, b, c, d, e, f, g, h, i, j"'):
        assert isinstance(parse_batch(f"[{op('GENERATE', prompt + fits)}]", max_ids=8)[0], Generate)


def test_fields_of_any_json_have_limits_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_JSON", {"json_schema": 12, "data": 12})
    long, short = '{"a": [[], []]}', '{"a": [[]]}'
    for fields, field in (('"GENERATE", {"prompt": [1], ', "json_schema"), ('"MODEL_INFO", {', "data")):
        assert (
            f" {field}: 15 bytes of JSON; 12 is the limit."
            in only(f'[[{fields}"stream_id": 1, "{field}": {long}}}]]').error
        )
        assert not isinstance(parse_batch(f'[[{fields}"stream_id": 1, "{field}": {short}}}]]')[0], Failure)


@pytest.mark.parametrize("field", ["choices", "regex", "grammar", "mask", "stop"])
def test_fields_that_would_be_long_are_not_even_parsed(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(protocol.MAX_JSON, field, 12)
    failure = only(f'[["GENERATE", {{"stream_id": 1, "prompt": [1], "{field}": [7, 7, 7, 7, 7]}}]]')
    assert failure.error == f"GENERATE {field}: 15 bytes of JSON; 12 is the limit."


def test_inputs_that_are_json_have_the_limits_of_the_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_JSON", {"choices": 12, "json_schema": 12})
    monkeypatch.setattr(protocol, "MAX_BIASES", 2)
    for parse, text in ((parse_choices, '["no", "yes"'), (parse_json_schema, '{"type": "no"')):
        with pytest.raises(RequestError, match=r"bytes of JSON; 12 is the limit" if len(text) > 12 else "must be"):
            parse(text)
    with pytest.raises(RequestError, match="logit_bias has 3 entries; 2 is the limit"):
        parse_logit_bias('{"1": 1, "2": 1, "3": ')


def test_every_operation_beside_one_that_cannot_be_read_is_answered_by_itself() -> None:
    good = '["MODEL_INFO", {"stream_id": 1}]'
    bad = '["GENERATE", {"stream_id": 2, "prompt": "\\ud800"}]'
    for before, after in (("3, ", ""), ("", ", 3.5"), ("null, tru, ", ""), ("", ', "text"'), ("1,2 ,", " , x")):
        answers = parse_batch(f"[{before}{bad}, {good}{after}]")
        assert ModelInfo(stream_id=1) in answers
        others = [answer for answer in answers if isinstance(answer, Failure)]
        assert len(others) == len(answers) - 1 == 1 + before.count(",") + after.count(",")
        assert [answer.stream_id for answer in others if "surrogate" in answer.error] == [2]
    for broken in (
        f"[{bad} {good}]",
        f"[{bad},, {good}]",
        f"[{bad}, {good},]",
        f"[,{bad}]",
        f"[1 2, {bad}",
        f"{bad}, 3",
    ):
        with pytest.raises(RequestError, match="JSON"):
            parse_batch(broken)


def test_an_operation_whose_id_is_refused_is_named_by_its_place() -> None:
    for written in ('"' + "a" * 300 + '"', "[1]", str(2**70)):
        failures = parse_batch(f'[["MODEL_INFO", {{"stream_id": 1}}], ["SCORE", {{"stream_id": {written}}}]]')
        assert isinstance(failures[1], Failure)
        assert failures[1].error.startswith("operation 1: SCORE stream_id: ")


def test_an_operation_has_a_limit_in_size_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_OPERATION_BYTES", 60)
    failure, other = parse_batch(
        '[["GENERATE", {"stream_id": 7, "prompt": "a text that is too long"}], ["MODEL_INFO", {"stream_id": 1}]]'
    )
    assert failure == Failure(stream_id=7, error="operation 0: 67 bytes; 60 is the limit.", kind="TOKEN")
    assert other == ModelInfo(stream_id=1)


def test_a_batch_too_long_to_be_split_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_SPLIT", 20)
    with pytest.raises(RequestError, match="JSON has no NaN and no Infinity; repair it, or send at most 20 characters"):
        parse_batch('[["GENERATE", {"stream_id": 1, "prompt": NaN}]]')


@pytest.mark.parametrize("text", ['[["' + '\\"' * 2_000_000, '[["GENERATE",{"stream_id":"' + "a" * 9_000_000 + '"}]]'])
def test_a_string_without_an_end_or_an_endless_id_is_read_once(text: str) -> None:
    """Quadratic reading of the first took minutes; a state for each character of the second took gigabytes."""
    with contextlib.suppress(RequestError):
        assert all(isinstance(operation, Failure) for operation in parse_batch(text, 8192))
