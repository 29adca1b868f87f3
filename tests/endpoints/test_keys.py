"""API keys and other secrets: refused where they cannot be right; never shown, logged or kept, whoever repeats them."""

import base64
import contextlib
import json
import logging
import sys
import traceback
import urllib.parse

import pytest

from configs import debug
from rlver_jax.endpoints.answer_cache import AnswerCache
from rlver_jax.endpoints.client import Client, Endpoint
from rlver_jax.endpoints.errors import EndpointError, Unavailable
from rlver_jax.evaluate import main
from tests.endpoints.server import ChatServer, rule
from tests.endpoints.test_client import ask
from tests.endpoints.test_proxy import FAR, VARIABLES, proxy_to

KEY = "sk-s3cret-ABCDefgh0123456789"
TOKEN = "tok-9876543210-zyxwvu"


def spellings(secret):
    raw = secret.encode()
    phases = [base64.b64encode(before + raw + b" and more") for before in (b"", b"a", b"Bearer ")]
    hexed = [b"".join(form % byte for byte in raw) for form in (b"%02x", b"%02X", b"%%%02X", b"\\u%04x", b"&#%d;")]
    return [secret, secret.upper(), secret[::-1], *(one.decode() for one in phases + hexed)]


def core(text):
    """What of a spelling must be nowhere: its middle, since a base64's ends depend on what stands beside it."""
    return text[4:-16] if len(text) > 44 and "%" not in text and "\\" not in text and "&" not in text else text


def assert_clean(data, *secrets):
    text = data.decode("latin-1") if isinstance(data, bytes) else data
    for secret in secrets:
        for spelled in spellings(secret):
            assert core(spelled).lower() not in text.lower(), f"{spelled} in {text[:1000]}"


@pytest.fixture
def cache(tmp_path):
    with contextlib.closing(AnswerCache(tmp_path / "answers.sqlite")) as answer_cache:
        yield answer_cache


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in VARIABLES:
        for spelled in (name, name.upper()):
            monkeypatch.delenv(spelled, raising=False)
    return monkeypatch.setenv


@pytest.mark.parametrize(
    ("key", "says"),
    [
        (f"{KEY}\n", "ends with a line end; mounted secrets often do"),
        (f" {KEY}", "begins with white space"),
        (f"{KEY[:9]} {KEY[9:]}", "holds white space"),
        (f"{KEY[:9]}\x01{KEY[9:]}", "holds a control character"),
        (f"{KEY}é", "not ASCII"),
        (" \n", "nothing but white space"),
        ("", "is empty"),
    ],
)
@pytest.mark.parametrize("option", ["side", "judge", "measures"])
def test_a_key_that_cannot_be_right_is_refused_at_the_start(server, tmp_path, capsys, environment, key, says, option):
    environment("MY_KEY", key)
    here = f"--config={debug.__file__}", f"--out={tmp_path / 'out'}", "--config.eval.num_profiles=1"
    if option == "side":
        fields = ("url", server.url), ("model", "m"), ("key_env", "MY_KEY")
        more = [f"--config.remote.user.{name}={value}" for name, value in fields]
    else:
        file = tmp_path / "judge.py"
        file.write_text(
            "from configs import debug\ndef get_config(arg=''):\n    c = debug.get_config()\n"
            f"    c.remote.user.url, c.remote.user.model, c.remote.user.key_env = {server.url!r}, 'm', 'MY_KEY'\n"
            "    return c\n"
        )
        more = [f"--{option}={file}"]
    assert main([*here, *more]) == 2
    out, err = capsys.readouterr()
    assert "remote.user.key_env='MY_KEY': the API key in this variable" in err
    assert says in err
    assert KEY[:5] not in out + err
    assert KEY[-5:] not in out + err
    assert server.count == 0


@pytest.mark.parametrize("key", [f"{KEY}\n", f"{KEY[:9]}\t{KEY[9:]}", f"{KEY}\x00", "ключ-0123456789"])
def test_a_client_refuses_it_too(cache, key):
    with pytest.raises(ValueError, match="API key") as caught:
        ask("http://127.0.0.1:9/v1", cache, key=key)
    assert_clean(everything_of(caught.value), KEY)
    assert "ключ" not in str(caught.value)


@pytest.mark.parametrize(
    "argument",
    [
        f"--config.remote.user.key_env={KEY}",
        f"--config.remote.user.api_key={KEY}",
        f'--config.remote.user.extra={{"api_key": "{KEY}"',
        f'--config.remote.user.extra=["{KEY}"]',
        f"--config.remote.user.url=http://me:{KEY}@127.0.0.1:9/v1",
        f"--config.remote.user.url=http://127.0.0.1:9/v1?api_key={KEY}",
        f"--config.remote.user.url=http://127.0.0.1:9/v1#{KEY}",
        f"--config.remote.user.uri=http://me:{KEY}@127.0.0.1:9/v1",
        f'--config.remote.user.extra={{"token": "{KEY}", "a": NaN}}',
        f'--config.remote.user.extra={{"token": "{KEY}", "a": "\\ud800"}}',
    ],
)
def test_a_key_in_the_wrong_place_is_not_repeated(tmp_path, capsys, argument):
    here = f"--config={debug.__file__}", f"--out={tmp_path / 'out'}", "--config.remote.user.model=m"
    url_flags = [] if "user.url" in argument else ["--config.remote.user.url=http://127.0.0.1:9/v1"]
    assert main([*here, *url_flags, argument]) == 2
    out, err = capsys.readouterr()
    assert "remote.user." in err
    assert_clean(out + err, KEY)
    assert not (tmp_path / "out" / "progress.json").exists()


def echoes(secret):
    """What a server may answer that wants a secret to be written down: a handler's answer each."""
    echoed = " | ".join(spellings(secret))
    odd = '{"choices": [{"message": {"content": "' + "".join(f"\\u{ord(char):04x}" for char in secret) + '"}}]}'
    split = "\x00".join(secret), "\u200b".join(secret), "\x1b".join(secret)
    return {
        "content": (200, json.dumps({"choices": [{"message": {"content": echoed}}]}), {}),
        "escapes": (200, odd, {}),
        "split": (200, json.dumps({"choices": [{"message": {"content": " ".join(split)}}]}), {}),
        "parts": (200, json.dumps({"choices": [{"message": {"content": [secret[:9], secret[9:]]}}]}), {}),
        "reasoning": (200, json.dumps({"choices": [{"message": {"content": "a", "reasoning": echoed}}]}), {}),
        "model": (200, json.dumps({"model": echoed, "choices": [{"message": {"content": "a"}}]}), {}),
        "refusal": (200, json.dumps({"choices": [{"message": {"content": None, "refusal": echoed}}]}), {}),
        "extras": (200, json.dumps({secret: echoed, "choices": [{"message": {"content": "a", secret: secret}}]}), {}),
        "usage": (200, json.dumps({"usage": {"x": echoed}, "choices": [{"message": {"content": "a"}}]}), {}),
        "headers": (200, json.dumps({"choices": [{"message": {"content": "a"}}]}), {"X-Key": secret}),
        "no completion": (200, echoed, {}),
        "html": (200, f"<html>{secret}</html>", {"Content-Type": "text/html"}),
        "coding": (200, "x", {"Content-Encoding": secret}),
        "refused": (400, json.dumps({"error": {"message": echoed}}), {}),
        "unauthorized": (401, echoed, {"WWW-Authenticate": secret}),
        "moved": (301, secret, {"Location": f"http://127.0.0.1:9/{secret}"}),
        "moved and kept": (307, "", {"Location": f"http://127.0.0.1:9/?{urllib.parse.urlencode({'k': secret})}"}),
        "full": (400, f"maximum context of {echoed}", {}),
        "busy": (503, echoed, {"Retry-After": secret}),
        "headers that are none": (200, "x", {"Content-Length": secret}),
    }


def everything_of(error):
    """An exception with all that it refers to: its traceback, what every frame of it holds, and its context."""
    told, seen = [], set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        told += [str(error), repr(error), repr(vars(error))]
        frames = traceback.walk_tb(error.__traceback__)
        ours = (frame for frame, _ in frames if "/tests/" not in frame.f_code.co_filename)
        told += [f"{name}={value!r}" for frame in ours for name, value in frame.f_locals.items()]
        error = error.__cause__ or error.__context__
    return "\n".join(told)


@pytest.mark.parametrize("what", echoes(""))
def test_whatever_a_server_repeats_is_nowhere(server, tmp_path, capfd, caplog, what):
    """The key, and a token in the request's own fields; with every logger at its most talkative."""
    status, body, headers = echoes(KEY)[what]
    status, second, _ = echoes(TOKEN)[what]

    def send(handler):
        handler.send_response(status)
        text = body if handler.command == "POST" and server.count % 2 else second
        for name, value in {"Content-Length": len(text.encode()), **headers}.items():
            handler.send_header(name, str(value))
        handler.end_headers()
        handler.wfile.write(text.encode())

    server.raw = send
    extra = {"metadata": {"access_token": TOKEN}, "n": 1}
    caplog.set_level(logging.DEBUG)
    failure, answers = None, []
    with contextlib.closing(AnswerCache(tmp_path / "answers.sqlite")) as cache:
        try:
            answers, _ = ask(server.url, cache, 2, key=KEY, extra=extra, deadline=0.4, concurrency=1)
        except EndpointError as error:
            failure = error
    told = everything_of(failure) + repr(answers) + caplog.text + "".join(capfd.readouterr())
    assert_clean(told, KEY, TOKEN)
    assert "***" in told or what in ("extras", "usage", "headers", "moved and kept", "headers that are none")
    for file in tmp_path.iterdir():
        assert_clean(file.read_bytes(), KEY, TOKEN)
    assert bool(answers) == (status == 200 and what not in ("no completion", "html", "coding", "headers that are none"))


def test_what_was_sent_is_what_was_given(server, cache):
    extra = {"metadata": {"access_token": TOKEN}, "headers": [{"Authorization": "Bearer xyz"}]}
    server.key = KEY
    ask(server.url, cache, key=KEY, extra=extra)
    assert server.bodies[0]["metadata"] == extra["metadata"]
    assert server.bodies[0]["headers"] == extra["headers"]
    (request,) = cache._file.execute("SELECT request FROM answers").fetchone()
    assert json.loads(request)["metadata"] == {"access_token": "***"}
    assert json.loads(request)["headers"] == [{"Authorization": "***"}]


@pytest.mark.parametrize("word", ["EMPTY", "none", "x", "anything"])
def test_a_word_for_a_key_leaves_answers_alone(server, cache, word):
    text = f"There is none, anything may be EMPTY: x, {word}"
    server.answer, server.key = lambda body: text, word
    (answer,), _ = ask(server.url, cache, key=word)
    assert answer.text == text


def test_an_endpoint_shows_no_secret(server):
    endpoint = Endpoint(f"http://me:{TOKEN}@h/v1?api_key={TOKEN}", "m", KEY, {"a": {"secret": TOKEN}})
    assert endpoint.key == KEY
    assert endpoint.extra["a"]["secret"] == TOKEN
    assert_clean(f"{endpoint!r} {endpoint}", KEY, TOKEN)


@pytest.mark.parametrize("address", ["http://me:{}@127.0.0.1:9/v1", "http://127.0.0.1:9/v1/{}:x@y"])
def test_secrets_of_an_address_are_not_told(cache, address):
    with pytest.raises(Unavailable) as caught:
        ask(address.format(TOKEN), cache, deadline=0.3)
    assert_clean(everything_of(caught.value), TOKEN)


PASSWORD = "p4ss/word-0123456789"


@pytest.mark.parametrize("echoed", [PASSWORD, urllib.parse.quote(PASSWORD, safe=""), "short", "basic", "url"])
@pytest.mark.parametrize("status", [403, 407, 502])
def test_a_proxy_that_repeats_its_password(server, cache, environment, echoed, status):
    user = "me:pw" if echoed == "short" else f"me:{PASSWORD}"
    sent = base64.b64encode(user.encode()).decode()
    address = f"http://{urllib.parse.quote(user, safe=':')}@127.0.0.1"
    words = {"short": f"Basic {sent}", "basic": f"Basic {sent}", "url": address}.get(echoed, echoed)
    with proxy_to(server, refusal=(status, f"<p>you are {words}</p>".encode())) as proxy:
        environment("HTTP_PROXY", f"{address}:{proxy.address.rpartition(':')[2]}")
        with pytest.raises(EndpointError) as caught:
            ask(FAR, cache, key=KEY, deadline=0.3)
    told = everything_of(caught.value)
    assert_clean(told, PASSWORD, urllib.parse.quote(PASSWORD, safe=""))
    assert sent not in told
    assert f"the proxy {proxy.address} (HTTP_PROXY)" in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        f"http://me:{TOKEN}", f"http://{TOKEN}:port", f"nonsense://me:{TOKEN}@h:1", f"http://h:port/?key={TOKEN}",
        f"http://me:{TOKEN}/x@h:1", f"socks4://me:{TOKEN}@h:1", f"http://h:99999/{TOKEN}", f"http://me:{TOKEN}\x01@h:1",
    ],
)  # fmt: skip
def test_an_address_of_a_proxy_that_cannot_be_read_is_not_told(cache, environment, monkeypatch, address):
    monkeypatch.setitem(sys.modules, "socksio", None)
    environment("ALL_PROXY", address)
    with pytest.raises(ValueError, match=r"the proxy .*\(ALL_PROXY\) cannot be used") as caught:
        Client(Endpoint(FAR, "m", KEY), cache)
    assert_clean(everything_of(caught.value), TOKEN, KEY)


EVERYWHERE = "--judge", "--measures", "side"


@pytest.mark.parametrize("option", EVERYWHERE)
def test_no_file_of_an_evaluation_holds_one(tmp_path, capfd, environment, option):
    """A whole evaluation and a second start, by a server that repeats the key wherever it can, and poison with it."""
    environment("MY_KEY", KEY)

    def answer(body):
        reply = rule(body)
        return {"content": reply + "\n" + KEY + "\ud800\0", "reasoning_content": KEY, KEY: KEY}

    usage = {"prompt_tokens": 10**400, "completion_tokens": -1, KEY: KEY}
    with ChatServer(answer) as server:
        server.key, server.headers = KEY, {"X-Key": KEY}
        server.whole = lambda whole: whole | {"model": f"m {KEY}\ud800", "usage": usage, KEY: [KEY]}
        extra = json.dumps({"metadata": {"access_token": TOKEN}, "other": KEY})
        fields = {"url": server.url, "model": "m", "key_env": "MY_KEY", "extra": extra}
        judge = tmp_path / "judge.py"
        lines = [f"    c.remote.user.{name} = {value!r}\n" for name, value in fields.items() if name != "extra"]
        lines += [f"    c.remote.user.extra = {extra.replace(KEY, 'x')!r}\n"]
        head = "from configs import debug\ndef get_config(arg=''):\n    c = debug.get_config()\n"
        judge.write_text(f"{head}{''.join(lines)}    return c\n")
        remote_flags = [
            f"--config.remote.{side}.{name}={x}" for side in ("user", "policy") for name, x in fields.items()
        ]
        here = [f"--config={debug.__file__}", f"--out={tmp_path / 'out'}", "--config.eval.max_turns=2"]
        here += ["--config.eval.num_profiles=2", "--config.remote.deadline=20", *remote_flags]
        here += [] if option == "side" else [f"{option}={judge}"]
        assert main(here) == 0, capfd.readouterr().err
        asked = server.count
        for file in (tmp_path / "out").rglob("*.json*"):
            if file.name != "progress.json":
                file.unlink()
        (tmp_path / "out" / "progress.json").unlink()
        assert main(here) == 0
        assert server.count == asked, "all from the cache"
    told = "".join(capfd.readouterr())
    assert_clean(told, KEY, TOKEN)
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert {"answers.sqlite", "dialogues.jsonl", "summary.json", "progress.json"} <= {file.name for file in files}
    assert option == "side" or any(file.suffix == ".jsonl" and file.name != "dialogues.jsonl" for file in files)
    for file in files:
        assert_clean(file.read_bytes(), KEY, TOKEN)
    records = [json.loads(line) for line in (tmp_path / "out" / "dialogues.jsonl").read_text().splitlines()]
    assert all("***" in record["messages"][1]["content"] for record in records)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["remote"]["user"]["models"] == ["m ***\ufffd"]
    assert summary["remote"]["user"]["prompt_tokens"] == 0


def test_a_folder_whose_settings_hold_one_goes_on_and_is_not_repeated(tmp_path, capfd):
    """As older versions wrote them."""
    extra = json.dumps({"api_key": TOKEN})
    with ChatServer() as server:
        remote_flags = [
            f"--config.remote.{side}.{name}={value}"
            for side in ("user", "policy")
            for name, value in (("url", server.url), ("model", "m"), ("extra", extra))
        ]
        here = [f"--config={debug.__file__}", f"--out={tmp_path}", "--config.eval.max_turns=1", *remote_flags]
        assert main([*here, "--config.eval.num_profiles=1"]) == 0
        progress = tmp_path / "progress.json"
        noted = json.loads(progress.read_text())
        assert noted["settings"]["remote.user.extra"] == '{"api_key": "***"}'
        noted["settings"]["remote.user.extra"] = extra
        progress.write_text(json.dumps(noted))
        assert main([*here, "--config.eval.num_profiles=1"]) == 0
        other = f"--config.remote.user.extra={json.dumps({'api_key': TOKEN, 'top_k': 1})}"
        assert main([*here, "--config.eval.num_profiles=1", other]) == 2
    told = "".join(capfd.readouterr())
    assert '"top_k": 1' in told
    assert_clean(told, TOKEN)
