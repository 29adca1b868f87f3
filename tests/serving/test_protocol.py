"""What requests may say: null and what holds anyway ask for nothing, replies can be sent back, errors quote safely."""

import json

import pytest

from rlver_jax.serving.errors import MAX_MESSAGE, ProtocolError, quoted
from rlver_jax.serving.protocol import ChatRequest, CompletionRequest, check_consistent, parse
from rlver_jax.serving.request_bodies import MAX_COMMAS, MAX_VALUES, json_object

SAID = {"role": "user", "content": "my boss did not listen."}
GOOD = {"model": "tiny", "messages": [SAID], "max_tokens": 3, "temperature": 0}

# `completion.choices[0].message.model_dump()` of the OpenAI client: 3.57, 1.60, and of servers that fill lists.
REPLIES = {
    "3.57": {
        **{"content": "so", "refusal": None, "role": "assistant", "annotations": None, "audio": None},
        **{"function_call": None, "tool_calls": None},
    },
    "1.60": {
        **{"content": "so", "refusal": None, "role": "assistant", "audio": None, "function_call": None},
        "tool_calls": None,
    },
    "lists": {"role": "assistant", "content": "so", "tool_calls": [], "annotations": [], "reasoning_content": None},
    "nothing said": {"content": None, "refusal": None, "role": "assistant", "tool_calls": None},
    "named": {"role": "assistant", "content": [{"type": "text", "text": "so", "cache_control": None}], "name": None},
}


def asked(change: dict, kind=ChatRequest):
    good = GOOD if kind is ChatRequest else {"model": "tiny", "prompt": "a"}
    ask = parse(kind, json.dumps(good | change).encode())
    check_consistent(ask)
    return ask


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_every_optional_field_may_be_null(kind):
    fields = {name: None for name, field in kind.model_fields.items() if not field.is_required()}
    fields |= {"newer_than_this_server": None, "metadata": {"a": None}}
    if kind is CompletionRequest:
        del fields["metadata"]
    plain = parse(
        kind, json.dumps({"model": "tiny", "messages": [SAID]} if kind is ChatRequest else {"model": "tiny"}).encode()
    )
    got = asked(fields | {"max_tokens": None, "temperature": None}, kind).model_dump()
    assert {k: v for k, v in got.items() if k != "metadata"} == {
        k: v for k, v in plain.model_dump().items() if k != "metadata"
    }


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"tools": []},
            {"functions": []},
            {"tool_choice": "none"},
            {"tool_choice": "auto"},
            {"function_call": "none"},
        ),
        *({"logit_bias": {}}, {"n": 1}, {"response_format": {"type": "text"}}, {"presence_penalty": 0}),
        *({"frequency_penalty": 0.0}, {"stop": []}, {"metadata": {}}, {"store": False}, {"modalities": ["text"]}),
        *({"parallel_tool_calls": True}, {"user": "me"}, {"service_tier": "auto"}, {"verbosity": "medium"}),
        *({"logprobs": False, "top_logprobs": 0}, {"stream_options": {}}, {"stream_options": {"include_usage": False}}),
        {"response_format": {"type": "text", "json_schema": None}},
        {"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": None}},
    ],
)
def test_what_holds_anyway_is_taken(change):
    asked(change)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"logit_bias": {"50256": -100}}, "logit_bias"),
        ({"presence_penalty": False}, "presence_penalty"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"store": True}, "store"),
        ({"n": 129}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 10**4000}, "seed"),
        ({"messages": [SAID, {"role": "assistant", "content": "", "refusal": "I won't."}]}, "messages.1.refusal"),
        ({"messages": [SAID, {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages.1.tool_calls"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0"),
        ({"messages": [None]}, "messages.0"),
        ({"stop": [None]}, "stop.0"),
    ],
)
def test_what_would_change_a_reply_is_refused(change, param):
    with pytest.raises(ProtocolError) as refused:
        asked(change)
    assert (refused.value.status, refused.value.body["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 3000}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "file", "file": {"file_id": "file-1"}},
        {"type": "refusal", "refusal": "no"},
        {"type": "\ud800"},
        {"type": ["text"]},
        "text",
        None,
    ],
)
def test_parts_other_than_text_are_named(part):
    content = [{"type": "text", "text": "what is this?"}, part]
    with pytest.raises(ProtocolError, match="part 1 is .*text here: no images, audio or files") as refused:
        asked({"messages": [{"role": "user", "content": content}]})
    assert refused.value.body["error"]["param"] == "messages.0.content"
    if isinstance(part, dict) and part["type"] == "image_url":
        assert "'image_url'" in refused.value.body["error"]["message"]


@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES)
def test_a_reply_can_be_sent_back_as_it_is(reply):
    messages = asked({"messages": [SAID, reply, SAID]}).messages
    assert messages[1].text == ("so" if reply["content"] else "")


def test_prompts_of_every_kind():
    for prompt, prompts in (
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3], []], [[1], [2, 3], []]),
        (None, [""]),
        (["a"] * 32, ["a"] * 32),
    ):
        assert asked({"prompt": prompt}, CompletionRequest).prompts == prompts
    for prompt in ([1, "a"], [1.5], [True], {"a": 1}, 3, [["a"]], [[1], "a"], [None]):
        with pytest.raises(ProtocolError, match="prompt: expected a text"):
            asked({"prompt": prompt}, CompletionRequest)


BAD_JSON = {
    b'{"a": "\x00"}': "control character",
    b'{"a": NaN}': "NaN",
    b'{"a": -Infinity}': "-Infinity",
    b'{"a": 1, "b": {"c": 1, "c": 2}}': "'c' stands twice",
    b'{"\\ud800": 1, "\\ud800": 2}': r"'\\ud800' stands twice",
    b"{1: 2}": "property name",
    b'{"a": 1}{"b": 2}': "Extra data",
    b'\xff\xfe{\x00"\x00': "no UTF-8",
    b'\xef\xbb\xbf{"a": 1}': "BOM",
    b'{"a": "\xed\xa0\x80"}': "no UTF-8",
    b'{"a":' * 5000 + b"1" + b"}" * 5000: "recursion",
    b'{"seed": ' + b"9" * 5000 + b"}": "thousands of digits",
    b"": "Expecting value",
    b"null": "NoneType",
    b"{" + b",".join(b'"%d":1' % i for i in range(600)) + b"}": "600 fields",
}


@pytest.mark.parametrize("body", BAD_JSON, ids=range(len(BAD_JSON)))
def test_bad_json_is_told(body):
    with pytest.raises(ProtocolError, match=BAD_JSON[body]) as refused:
        json_object(body)
    assert refused.value.status == 400
    json.dumps(refused.value.body, ensure_ascii=False).encode()


def test_what_a_large_body_holds_is_bounded():
    """Just as much is taken; one more is not. Quotes and brackets within strings don't count."""
    for unit, most in ((b'"",', MAX_VALUES - 1), (b"[],", MAX_VALUES - 2), (b"1,", MAX_COMMAS - 1)):
        assert len(json_object(b'{"":[' + unit * (most - 1) + unit[:-1] + b"]}")[""]) == most
        with pytest.raises(ProtocolError, match="holds more than"):
            json_object(b'{"":[' + unit * (most + 2) + unit[:-1] + b"]}")
    for text in ('"[{,\\' * 100_000, "\\" * 300_000, 'a"' * 250_000, "x" + '"\\' * 250_000 + "["):
        assert json_object(json.dumps({"a": text}).encode()) == {"a": text}
    text = "[" * 100_000
    assert json_object(json.dumps({"a": text}).encode()) == {"a": text}


@pytest.mark.parametrize(
    "value", ["\ud800", "\x00\x1b[31m\n", "\u202e", "x" * 1_000_000, ["\ud800"] * 99, {"\ud800": 1}]
)
@pytest.mark.parametrize("field", ["model", "temperature", "stop", "user", "tools", "metadata", "messages", "\ud800\n"])
def test_errors_are_short_printable_utf8(field, value):
    try:
        parse(ChatRequest, json.dumps(GOOD | {field: value}).encode())
    except ProtocolError as error:
        message, param = error.body["error"]["message"], error.body["error"]["param"]
        assert message.isprintable()
        assert len(message) <= MAX_MESSAGE * 10
        assert param is None or param.isprintable()
        json.dumps(error.body, ensure_ascii=False).encode()
    assert quoted(value).isprintable()
    assert len(quoted(value)) <= 100
