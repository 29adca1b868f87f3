"""The server through OpenAI's own client and through bare HTTP."""

import concurrent.futures
import dataclasses
import http.client
import json
import socket
import time
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import openai
import pydantic
import pytest
import transformers
from starlette.testclient import TestClient

from rlver_jax.serving import programs
from rlver_jax.serving.app import ROUTES, Service
from rlver_jax.serving.engine import Engine
from rlver_jax.serving.errors import ProtocolError
from rlver_jax.serving.protocol import ChatRequest
from rlver_jax.serving.request_bodies import MAX_BODY
from rlver_jax.text.chat import ChatTemplate
from rlver_jax.text.tokenizer import load_tokenizer
from tests.conftest import ROOT, SHORT_PROMPTS, plain
from tests.serving.conftest import CONTEXT, QUEUE, ROWS, serving
from tests.text.conftest import as_published, write_bpe, write_qwen3

SAY = [{"role": "system", "content": "Say."}, {"role": "user", "content": "my boss did not listen."}]


def chat(client, messages=SAY, **more):
    ask = {"temperature": 0, "max_tokens": 20} | more
    return client.chat.completions.create(model="tiny", messages=messages, **ask)


def complete(client, prompt, **more):
    ask = {"temperature": 0, "max_tokens": 20} | more
    return client.completions.create(model="tiny", prompt=prompt, **ask)


def prompt_ids(bpe, messages=SAY) -> list[int]:
    return ChatTemplate(bpe).conversation(messages, generation_prompt=True)


@pytest.mark.slow
def test_greedy_replies_are_those_of_the_dialogue_sampler(client, bpe, played):
    """Every reply of whole dialogues again through HTTP, thought and say: the first as chat, all as token ids."""
    d, tokenizer, compared = played.dialogues, ChatTemplate(bpe), 0
    system = {"role": "system", "content": SHORT_PROMPTS["policy_think.j2"]}
    options = {"extra_body": {"continue_final_message": True, "add_generation_prompt": False}, "max_tokens": 24}
    for b in range(len(played.profiles)):
        ids = tokenizer.message(**system)
        heard = d.first_talk[b, : d.first_count[b]].tolist()
        for turn in range(d.turns[b]):
            completion = d.policy.completion
            count = completion.count[turn, b] - completion.stopped[turn, b]
            reply = bpe.decode(completion.tokens[turn, b, :count])
            ids += tokenizer.open("user") + heard + tokenizer.close + tokenizer.open("assistant")
            asked = complete(client, ids + bpe.encode("<think>\n"), max_tokens=int(completion.count[turn, b]))
            assert asked.choices[0].text == reply
            if turn == 0 and bpe.encode(bpe.decode(heard)) == heard:
                begun = {"role": "assistant", "content": "<think>\n"}
                words = [system, {"role": "user", "content": bpe.decode(heard)}, begun]
                assert chat(client, words, **options).choices[0].message.content.startswith(reply)
            compared += count
            ids += d.policy.say[turn, b, : d.policy.say_count[turn, b]].tolist() + tokenizer.close
            count = d.user.reply.count[turn, -1, b] - d.user.reply.stopped[turn, -1, b]
            heard = d.user.reply.tokens[turn, -1, b, :count].tolist()
    assert d.turns.sum() > 6
    assert compared > 60


def test_log_probabilities_are_the_models(client, policy_lm, bpe):
    """Of a chat, with the likeliest tokens, and of a completion with its prompt; warm, yet at temperature 1."""
    reply = chat(client, temperature=1.7, seed=3, logprobs=True, top_logprobs=5).choices[0]
    tokens = [t for entry in reply.logprobs.content for t in (_token(bpe, entry.bytes),)]
    ids = prompt_ids(bpe)
    logp = plain(policy_lm, [ids + tokens])[1][0][len(ids) - 1 : -1]
    assert len(tokens) > 3
    for entry, token, expected in zip(reply.logprobs.content, tokens, logp, strict=True):
        assert entry.logprob == pytest.approx(expected[token], abs=1e-4)
        np.testing.assert_allclose([t.logprob for t in entry.top_logprobs], -np.sort(-expected)[:5], atol=1e-4)
    pieces = list(client.completions.create(model="tiny", prompt=ids, logprobs=1, seed=3, max_tokens=9, stream=True))
    offsets = [n for p in pieces if p.choices[0].logprobs for n in p.choices[0].logprobs.text_offset]
    whole = client.completions.create(model="tiny", prompt=ids, logprobs=1, seed=3, max_tokens=9).choices[0]
    assert offsets == whole.logprobs.text_offset
    assert b"".join(bytes(e.bytes) for e in reply.logprobs.content).decode() == reply.message.content

    echo = complete(client, ids, echo=True, logprobs=1, max_tokens=0).choices[0]
    logp = plain(policy_lm, [ids])[1][0]
    assert echo.logprobs.token_logprobs[0] is None
    np.testing.assert_allclose(echo.logprobs.token_logprobs[1:], logp[np.arange(len(ids) - 1), ids[1:]], atol=1e-4)
    best = [next(iter(top.values())) for top in echo.logprobs.top_logprobs[1:]]
    np.testing.assert_allclose(best, logp[:-1].max(1), atol=1e-4)
    assert echo.text == bpe.decode(ids)


def _token(bpe, piece) -> int:
    return next(t for t in range(bpe.vocab_size) if bpe.token_bytes(t) == bytes(piece))


def test_a_stream_is_the_whole_reply_in_pieces(client):
    for more in ({}, {"temperature": 1.2, "seed": 5, "n": 2}, {"stop": ["did", "awful"], "seed": 4, "temperature": 1}):
        whole = chat(client, **more)
        texts, ends, usage = {}, {}, None
        for chunk in chat(client, stream=True, stream_options={"include_usage": True}, **more):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
                ends[choice.index] = choice.finish_reason or ends.get(choice.index)
        assert texts == {c.index: c.message.content for c in whole.choices}
        assert ends == {c.index: c.finish_reason for c in whole.choices}
        assert usage == whole.usage
        assert usage.prompt_tokens > 20


def test_stop_strings_end_a_reply_before_them(client):
    ask = {"temperature": 1.5, "seed": 4}
    free = chat(client, **ask).choices[0].message.content
    assert len(free) > 12
    for stop in (free[5:8], free[7]):
        cut = chat(client, stop=stop, **ask).choices[0]
        assert (cut.message.content, cut.finish_reason) == (free[: free.index(stop)], "stop")
    assert chat(client, **ask | {"max_tokens": 2}).choices[0].finish_reason == "length"


def test_a_seed_means_one_reply(client):
    ask = {"temperature": 1.5, "max_tokens": 12}
    first = [chat(client, seed=n, **ask).choices[0].message.content for n in range(6)]
    assert [chat(client, seed=n, **ask).choices[0].message.content for n in range(6)] == first
    assert len(set(first)) > 2
    two = [c.message.content for c in chat(client, seed=0, n=2, **ask).choices]
    assert two[0] == first[0]
    unseeded = {chat(client, **ask).choices[0].message.content for _ in range(6)}
    assert len(unseeded) > 2, "without a seed every reply is drawn anew"


def test_a_message_goes_on_where_it_was_begun(client, bpe):
    """`continue_final_message`: as the policy's thoughts are opened on the device."""
    think = [{"role": "system", "content": "Think, say."}, SAY[1]]
    begun = [*think, {"role": "assistant", "content": "<think>\n"}]
    options = {"continue_final_message": True, "add_generation_prompt": False}
    reply = chat(client, begun, extra_body=options).choices[0].message.content
    ids = prompt_ids(bpe, think) + bpe.encode("<think>\n")
    assert reply == complete(client, ids).choices[0].text
    assert "</think>" in reply


def test_without_a_system_message_it_is_qwens_own(client, bpe):
    system = {"role": "system", "content": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."}
    assert chat(client, SAY[1:]).usage.prompt_tokens == len(prompt_ids(bpe, [system, SAY[1]]))
    parts = [{"role": "user", "content": [{"type": "text", "text": "my boss "}, {"type": "text", "text": "did."}]}]
    assert chat(client, parts).usage == chat(client, [{"role": "user", "content": "my boss did."}]).usage


def test_without_a_system_message_the_folders_template_speaks(engine, bpe, tmp_path):
    """Another default, and a reply that begins as the template says: AutoTokenizer's ids. A refusal is the client's."""
    each = "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    first = "{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nStep by step.<|im_end|>\n' }}{%- endif %}"
    refusal = "{%- if messages[-1].role != 'user' %}{{ raise_exception('ask something') }}{%- endif %}"
    start = "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
    folder = as_published(write_bpe(tmp_path), chat_template=refusal + first + each + start)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = SimpleNamespace(tokenizer=load_tokenizer(folder), context=engine.context)
    service = Service(theirs, "tiny", 0)
    ask = lambda messages, **options: service._chat_prompt(ChatRequest(model="tiny", messages=messages, **options))  # noqa: E731
    for messages in (SAY[1:], SAY):
        want = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ask(messages) == want
    assert bpe.decode(want[-4:]).endswith("<think>\n")
    own = dataclasses.replace(service, system="Our own.")
    own_messages = [{"role": "system", "content": "Our own."}, SAY[1]]
    assert own._chat_prompt(ChatRequest(model="tiny", messages=SAY[1:])) == ask(own_messages)
    with pytest.raises(ProtocolError, match="ask something") as refused:
        ask([*SAY, {"role": "assistant", "content": "No."}])
    assert refused.value.status == 400
    begun = {"role": "assistant", "content": "<think>\nhm"}
    options = {"continue_final_message": True, "add_generation_prompt": False}
    rest = [*bpe.encode("assistant\n"), *bpe.encode("<think>\nhm")]
    plain = reference.apply_chat_template(SAY[1:], return_dict=False)
    assert ask([SAY[1], begun], **options) == [*plain, bpe.im_start_id, *rest]


def test_a_chat_says_whether_the_reply_begins_with_a_thought(engine, tmp_path):
    """Beside Qwen3's template as transformers renders it; a policy that was trained without thoughts has none."""
    folder = write_qwen3(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = SimpleNamespace(tokenizer=load_tokenizer(folder), context=engine.context)
    for service in (Service(theirs, "tiny", 0), Service(theirs, "tiny", 0, thinking=False)):
        for told in (None, True, False):
            options = {} if told is None else {"chat_template_kwargs": {"enable_thinking": told}}
            wanted = service.thinking if told is None else told
            kwargs = {} if wanted is None else {"enable_thinking": wanted}
            want = reference.apply_chat_template(SAY, add_generation_prompt=True, return_dict=False, **kwargs)
            assert service._chat_prompt(ChatRequest(model="tiny", messages=SAY, **options)) == want
    with pytest.raises(pydantic.ValidationError, match="tools_in_user_message"):
        ChatRequest(model="tiny", messages=SAY, chat_template_kwargs={"tools_in_user_message": False})


def test_a_system_prompt_of_ones_own_stands_where_there_is_none(engine, bpe):
    policys = {"role": "system", "content": SHORT_PROMPTS["policy_think.j2"]}
    service = Service(engine, "tiny", 0, system=policys["content"])
    ask = lambda messages: service._chat_prompt(ChatRequest(model="tiny", messages=messages))  # noqa: E731
    assert ask(SAY[1:]) == prompt_ids(bpe, [policys, SAY[1]])
    assert ask(SAY) == prompt_ids(bpe, SAY), "a request's own goes first"


def test_requests_that_come_together_are_answered_together(client, engine):
    """More clients than rows: the same replies as one by one, fewer steps, and nothing is compiled."""
    kinds = [{"temperature": t, "seed": n, "top_p": p} for n, (t, p) in enumerate([(0, 1), (1.3, 1), (0.8, 0.6)] * 6)]
    reply_to = lambda k: chat(client, max_tokens=30, **k).choices[0].message.content  # noqa: E731
    before, compiled = engine.stats(), programs.compiled()
    alone = [reply_to(k) for k in kinds]
    middle = engine.stats()
    with concurrent.futures.ThreadPoolExecutor(len(kinds)) as pool:
        assert list(pool.map(reply_to, kinds)) == alone
    after = engine.stats()
    generated = [b["tokens"]["generated"] - a["tokens"]["generated"] for a, b in ((before, middle), (middle, after))]
    steps = [b["steps"] - a["steps"] for a, b in ((before, middle), (middle, after))]
    assert generated[0] == generated[1] == steps[0], "one row at a time"
    assert steps[1] < steps[0], f"{generated[1]} tokens in {steps[1]} steps of {ROWS} rows: none were answered together"
    assert programs.compiled() == compiled


def post(url, path, body: bytes | dict, headers=None, method="POST"):
    """(status, JSON) of a bare request."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, sent, {"Content-Type": "application/json"} if headers is None else headers)
    response = connection.getresponse()
    status, text = response.status, response.read()
    connection.close()
    return status, json.loads(text)


GOOD = {"model": "tiny", "messages": SAY}
LONG = "a b " * CONTEXT
FAULTS = {
    "bad json": (b'{"model": "tiny"', 400, "invalid_json", "not JSON"),
    "nan": (b'{"model": "tiny", "temperature": NaN}', 400, "invalid_json", "NaN"),
    "not utf-8": (b'{"model": "\xff"}', 400, "invalid_json", "not JSON"),
    "deep": (b'{"a": ' * 100_000, 400, "invalid_json", "not JSON"),
    "a list": (b"[1]", 400, "invalid_json", "list"),
    "unknown model": (GOOD | {"model": "gpt-9"}, 404, "model_not_found", "tiny"),
    "no model": ({"messages": SAY}, 400, None, "model"),
    "no messages": (GOOD | {"messages": []}, 400, None, "messages"),
    "unknown field": (GOOD | {"temprature": 0}, 400, None, "temprature"),
    "too long": (GOOD | {"messages": [{"role": "user", "content": LONG}]}, 400, "context_length_exceeded", "context"),
    "asks for too much": (GOOD | {"max_tokens": CONTEXT}, 400, "context_length_exceeded", str(CONTEXT)),
    "huge body": (b" " * (MAX_BODY + 1), 413, "request_too_large", "bytes"),
    "hot": (GOOD | {"temperature": 9}, 400, None, "temperature"),
    "no mass": (GOOD | {"top_p": 0}, 400, None, "top_p"),
    "many": (GOOD | {"n": 1000}, 400, None, "n"),
    "empty stop": (GOOD | {"stop": [""]}, 400, None, "stop"),
    "tools": (GOOD | {"tools": [{"type": "function"}]}, 400, None, "tools"),
    "json mode": (GOOD | {"response_format": {"type": "json_object"}}, 400, None, "response_format"),
    "image": (GOOD | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None, "messages"),
    "role": (GOOD | {"messages": [{"role": "tool", "content": "x"}]}, 400, None, "role"),
    "surrogate": (GOOD | {"messages": [{"role": "user", "content": "\ud800"}]}, 400, None, "surrogate"),
    "top without logprobs": (GOOD | {"top_logprobs": 3}, 400, None, "logprobs"),
    "penalty": (GOOD | {"frequency_penalty": 1}, 400, None, "frequency_penalty"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_get_the_protocols_error_object(url, name):
    body, status, code, told = FAULTS[name]
    got, answer = post(url, "/v1/chat/completions", body)
    assert (got, answer["error"]["code"]) == (status, code), answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    assert told in answer["error"]["message"]
    assert len(answer["error"]["message"]) < 400


def test_other_faults(url):
    good = {"model": "tiny", "prompt": "a"}
    for change, told in (
        ({"prompt": [999_999]}, "vocabulary"),
        ({"prompt": [-1]}, "vocabulary"),
        ({"prompt": []}, "replies a request"),
        ({"prompt": ["a"] * 99}, "replies a request"),
        ({"best_of": 3}, "best_of"),
        ({"max_tokens": 0}, "echo"),
        ({"logprobs": 6}, "logprobs"),
    ):
        status, answer = post(url, "/v1/completions", good | change)
        assert status == 400
        assert told in answer["error"]["message"]
    assert post(url, "/v1/completions", good, {"Content-Type": "text/plain"})[0] == 415
    assert post(url, "/v1/embeddings", {})[0] == 404
    status, answer = post(url, "/v1/chat/completions", b"", method="GET")
    assert (status, answer["error"]["type"]) == (405, "invalid_request_error")
    assert post(url, "/health", b"", method="GET") == (200, {"status": "ok"})


def test_models(client):
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "rlver_jax"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("other")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_rows(url, engine, monkeypatch, stream):
    """Steps are made slow, so that nothing could be said to the end before it is noticed."""
    ask = engine._slot_requests
    monkeypatch.setattr(engine, "_slot_requests", lambda rows: (time.sleep(0.2), ask(rows))[1])
    before = engine.stats()
    body = json.dumps(GOOD | {"temperature": 2, "max_tokens": 250, "stream": stream, "seed": 1, "n": ROWS}).encode()
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    while not engine.stats()["steps"] > before["steps"]:
        time.sleep(0.01)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    deadline = time.monotonic() + 20
    while (now := engine.stats())["busy"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert now["busy"] == 0
    ended = {k: now["replies"][k] - before["replies"][k] for k in now["replies"]}
    assert ended["accepted"] == ended["finished"] + ended["cancelled"] == ROWS
    assert ended["cancelled"] > 0
    assert now["steps"] - before["steps"] < 40


def test_a_full_queue_says_so_and_a_token_is_asked_for(engine, bpe):
    engine = Engine(engine.lm, bpe, rows=ROWS, context=CONTEXT, block=3, queue=2)
    with serving(engine, token="s3cret") as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError, match="bearer token"):
                chat(client)
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="s3cret", max_retries=0) as client:
            assert chat(client).choices[0].finish_reason
            with pytest.raises(openai.RateLimitError, match="at most 2"):
                chat(client, n=3)
        assert post(url, "/health", b"", method="GET")[0] == 200, "health needs no token"


def test_an_engine_that_fails_says_so(engine, bpe, monkeypatch):
    """A device error becomes an answer, not a client that waits for ever."""
    engine = Engine(engine.lm, bpe, rows=ROWS, context=CONTEXT, block=3, queue=QUEUE)
    with serving(engine) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:

        def broken(*args, **kwargs):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(programs, "decode_block", broken)
        with pytest.raises(openai.InternalServerError, match="could not be finished"):
            chat(client)
        with pytest.raises(openai.InternalServerError, match="going down"):
            chat(client)
        assert post(url, "/health", b"", method="GET")[0] == 503
        assert isinstance(engine.failure, RuntimeError)


def test_every_route_is_documented_and_asks_for_the_token_but_health(engine):
    client = TestClient(Service(engine, "tiny", 0, token="secret").app())
    manual = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    for route in ROUTES:
        path = route.path.replace("{name:path}", "tiny")
        assert client.request(route.method, path).status_code == (200 if path == "/health" else 401), path
        assert f"{route.method} {path.removesuffix('/tiny')}`" in manual
    header = {"Authorization": "Bearer secret"}
    assert client.get("/v1/models/tiny", headers=header).json()["id"] == "tiny"
    assert client.post("/v1/models", headers=header).status_code == 405
