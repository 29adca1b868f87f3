"""Endpoints behind a real proxy on loopback: who is asked through it, and what is said where it refuses."""

import contextlib
import http.client
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from rlver_jax.endpoints.answer_cache import AnswerCache
from rlver_jax.endpoints.client import Client, Endpoint
from rlver_jax.endpoints.errors import EndpointError, Unavailable
from rlver_jax.endpoints.proxy import is_loopback, proxy_of
from tests.endpoints.server import rule
from tests.endpoints.test_client import KEY, ask
from tests.in_background import InBackground

FAR = "http://model.example/v1"  # nobody has this name (RFC 2606): only a proxy can reach it
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


class Proxy(InBackground):
    """Takes requests with whole addresses and CONNECT; brings them to `target` (host, port), or answers `refusal`."""

    def __init__(self, target: tuple[str, int], refusal: tuple[int, bytes] | None = None):
        self.target, self.refusal, self.seen = target, refusal, []
        self.lasts = sys.maxsize  # requests that are refused
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                outer.seen.append(self.path)
                body = self.rfile.read(int(self.headers["Content-Length"]))
                refused = outer.refusal if len(outer.seen) <= outer.lasts else None
                self._answer(*(refused or outer.bring(self, body)))

            def do_CONNECT(self):
                outer.seen.append(f"CONNECT {self.path}")
                self._answer(*(outer.refusal or (502, b"no tunnels here")))

            def _answer(self, status, body):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        super().__init__(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_port}"

    def bring(self, handler, body):
        asked = http.client.HTTPConnection(*self.target, timeout=10)
        asked.request("POST", urlsplit(handler.path).path, body, dict(handler.headers))
        answer = asked.getresponse()
        return answer.status, answer.read()


@pytest.fixture
def cache():
    with contextlib.closing(AnswerCache(None)) as answer_cache:
        yield answer_cache


@pytest.fixture
def environment(monkeypatch):
    for name in VARIABLES:
        for spelled in (name, name.upper()):
            monkeypatch.delenv(spelled, raising=False)
    return monkeypatch.setenv


def proxy_to(server, **fields):
    return Proxy((urlsplit(server.url).hostname, urlsplit(server.url).port), **fields)


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_what_runs_on_this_machine_is_asked_directly(server, cache, environment, variable, host):
    with proxy_to(server, refusal=(403, b"<html>forbidden</html>")) as proxy:
        environment(variable, f"http://{proxy.address}")
        (answer,), _ = ask(server.url.replace("127.0.0.1", host), cache)
    assert answer.text == rule(server.bodies[0])
    assert proxy.seen == []


@pytest.mark.parametrize("spelled", ["http://{}", "{}", "http://me:pass-word@{}"])
def test_what_does_not_goes_through_the_proxy(server, cache, environment, spelled):
    with proxy_to(server) as proxy:
        environment("HTTP_PROXY", spelled.format(proxy.address))
        (answer,), _ = ask(FAR, cache)
    assert answer.text == rule(server.bodies[0])
    assert proxy.seen == [f"{FAR}/chat/completions"]


@pytest.mark.parametrize("exempt", ["model.example", ".example", "*", "other, model.example:80"])
def test_no_proxy_is_heeded(server, cache, environment, exempt):
    with proxy_to(server) as proxy:
        environment("HTTP_PROXY", f"http://{proxy.address}")
        environment("NO_PROXY", exempt)
        with pytest.raises(Unavailable, match="Connect") as caught:
            ask(FAR.replace("example/", "example:80/"), cache, deadline=0.5)
    assert proxy.seen == []
    assert "proxy" not in str(caught.value)


def test_a_refusal_of_the_proxy_is_no_bad_key(server, cache, environment):
    with proxy_to(server, refusal=(403, b"<html>not to be visited</html>")) as proxy:
        environment("HTTP_PROXY", f"http://me:pass-word@{proxy.address}")
        with pytest.raises(EndpointError) as caught:
            ask(FAR, cache, key=KEY)
    message = str(caught.value)
    assert f"the proxy {proxy.address} (HTTP_PROXY) answered with status 403" in message
    assert "not to be visited" in message
    assert "put model.example into NO_PROXY" in message
    assert "key" not in message
    assert "pass-word" not in message
    assert len(proxy.seen) == 1, "asked once: it would refuse again"


def test_a_proxy_that_wants_a_password(server, cache, environment):
    with proxy_to(server, refusal=(407, b'{"error": "who are you"}')) as proxy:
        environment("http_proxy", proxy.address)
        with pytest.raises(EndpointError, match=r"\(http_proxy\) answered with status 407.*http://USER:PASSWORD@"):
            ask(FAR, cache)


def test_a_key_that_the_endpoint_refuses_is_still_called_one(server, cache, environment):
    server.key = "another"
    with proxy_to(server) as proxy:
        environment("HTTP_PROXY", f"http://{proxy.address}")
        with pytest.raises(EndpointError, match=r"status 401.*asked through the proxy.*key_env"):
            ask(FAR, cache, key=KEY)


def test_a_proxy_in_trouble_is_asked_again(server, cache, environment):
    with proxy_to(server, refusal=(502, b"bad gateway")) as proxy:
        environment("HTTP_PROXY", f"http://{proxy.address}")
        proxy.lasts = 2
        (answer,), client = ask(FAR, cache)
        assert answer.text == rule(server.bodies[0])
        assert (len(proxy.seen), client.traffic.failed) == (3, 2)
        proxy.lasts = sys.maxsize
        with pytest.raises(Unavailable, match=r"the proxy .* \(HTTP_PROXY\) answered with status 502: bad gateway"):
            ask(FAR, cache, deadline=0.3, extra={"x": 1})


def test_a_proxy_that_is_not_there(cache, environment):
    environment("HTTP_PROXY", "http://127.0.0.1:9")
    with pytest.raises(Unavailable, match=r"the proxy 127.0.0.1:9 \(HTTP_PROXY\) cannot be reached.*unset HTTP_PROXY"):
        ask(FAR, cache, deadline=0.3)


@pytest.mark.parametrize(("status", "error"), [(403, EndpointError), (407, EndpointError), (503, Unavailable)])
def test_a_tunnel_that_is_refused(server, cache, environment, status, error):
    with proxy_to(server, refusal=(status, b"no")) as proxy:
        environment("HTTPS_PROXY", f"http://{proxy.address}")
        with pytest.raises(
            EndpointError, match=rf"\(HTTPS_PROXY\) opens no connection \(ProxyError {status}"
        ) as caught:
            ask(FAR.replace("http", "https"), cache, deadline=0.5)
    assert type(caught.value) is error
    assert proxy.seen[0] == "CONNECT model.example:443"


@pytest.mark.parametrize(
    "address",
    [
        *("socks5://127.0.0.1:9", "nonsense://x", "http://h:port", "http://127.0.0.1:99999", "http://", "::1:80"),
        *("http://me:pass/word@h:1", "http://me:pass#word@h:1", "socks4://me:pass@h:1"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_named(cache, environment, address, monkeypatch):
    monkeypatch.setitem(sys.modules, "socksio", None)  # not installed
    environment("ALL_PROXY", address)
    with pytest.raises(ValueError, match=r"ALL_PROXY\) cannot be used for http://model.example") as caught:
        Client(Endpoint(FAR, "m"), cache)
    assert "pass" not in str(caught.value).replace("a password", "")
    Client(Endpoint("http://[::1]:9/v1", "m"), cache)  # it doesn't concern this machine


@pytest.mark.parametrize(
    ("host", "here"),
    [
        *[(host, True) for host in ("127.0.0.1", "127.9.8.7", "::1", "::ffff:127.0.0.1", "0.0.0.0", "::")],
        *[(host, True) for host in ("localhost", "LOCALHOST", "localhost.", "api.localhost")],
        *[(host, True) for host in ("127.1", "0x7f000001", "2130706433", "ip6-localhost", "localhost.localdomain")],
        (socket.gethostname(), True),
        *[(host, False) for host in ("10.0.0.1", "128.0.0.1", "localhost.example", "mylocalhost", "2001:db8::1", "")],
        *[(host, False) for host in ("10.1", "face", "127.example")],
    ],
)
def test_loopback(host, here):
    assert is_loopback(host) == here


@pytest.mark.parametrize(
    ("url", "exempt", "asked_through"),
    [
        ("http://10.1.2.3:8000/v1", "10.0.0.0/8", False),
        ("http://11.1.2.3:8000/v1", "10.0.0.0/8", True),
        ("http://10.1.2.3:8000/v1", "10.1.2.3", False),
        ("http://[2001:db8::7]/v1", "2001:db8::/32", False),
        ("http://[2001:db8::7]/v1", "[2001:db8::7]", False),
        ("http://a.example/v1", "*.example", False),
        ("http://a.example/v1", ".EXAMPLE", False),
        ("http://notexample/v1", "example", True),
        ("http://a.example:81/v1", "a.example:80", True),
        ("http://a.example/v1", "", True),
        ("http://a.example/v1", ",, b.example", True),
    ],
)
def test_no_proxy_entries(environment, url, exempt, asked_through):
    environment("HTTP_PROXY", "http://p:1")
    environment("NO_PROXY", exempt)
    assert (proxy_of(url) is not None) == asked_through


def test_each_scheme_has_its_proxy(environment):
    environment("HTTPS_PROXY", "http://p:1")
    assert proxy_of("http://a.example") is None
    assert str(proxy_of("https://a.example")) == "the proxy p:1 (HTTPS_PROXY)"
    environment("ALL_PROXY", "http://q:2/")
    assert str(proxy_of("http://a.example")) == "the proxy q:2 (ALL_PROXY)"
    environment("ALL_PROXY", "  ")
    assert proxy_of("http://a.example") is None
