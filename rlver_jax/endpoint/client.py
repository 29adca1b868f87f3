"""Asks a model behind an OpenAI-compatible endpoint for chat completions.

Whatever may pass is tried again until a deadline: no connection, a dropped one, a timeout, statuses 408, 409, 425, 429
and 5xx, and bodies that are no completion. Waits double, with jitter; `Retry-After` and the `x-ratelimit-…` headers
hold back all requests to the endpoint. A request keeps its place among the concurrent ones while it waits, so an
endpoint in trouble gets fewer of them. A proxy between here and there (`proxy_of`) says things of its own.
"""

import asyncio
import dataclasses
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2 as httpx
import tenacity

from rlver_jax.endpoint.answers import AnswerCache, request_key
from rlver_jax.endpoint.errors import ContextFull, EndpointError, Unavailable
from rlver_jax.endpoint.limits import pause_of
from rlver_jax.endpoint.proxy import Proxy, proxy_of

Message = Mapping[str, str]  # role and content
_PASSING = frozenset({408, 409, 425, 429})  # beside 5xx
_FULL = ("context_length_exceeded", "context length", "maximum context", "context window", "too many tokens")
LONGEST_WAIT = 30.0  # seconds between two attempts, unless the endpoint asks for more
_SHORTEST_KEY = 8  # characters; "none" or "EMPTY", for servers that want any key, are words and no secrets


class _Passing(Exception):
    """A failure that may pass; `pause`: seconds that the endpoint asks for."""

    def __init__(self, what: str, pause: float = 0.0):
        super().__init__(what)
        self.pause = pause


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where a model is, and how it is asked.

    Attributes:
        url: base, such as http://127.0.0.1:8000/v1.
        model: its name there.
        key: API key, sent as bearer token; empty: none. Never part of a message, a log or the cache.
        extra: fields that are added to every request's body; null removes one of ours.
        concurrency: requests at once.
        timeout: seconds that one attempt may take.
        deadline: seconds for a request with all its attempts.
        first_wait: seconds, before the second attempt.
    """

    url: str
    model: str
    key: str = dataclasses.field(default="", repr=False)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    concurrency: int = 8
    timeout: float = 120.0
    deadline: float = 600.0
    first_wait: float = 0.5


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model said; `reasoning` where the endpoint gives it apart. Tokens are the endpoint's own count."""

    text: str
    reasoning: str
    prompt_tokens: int
    completion_tokens: int
    model: str  # as the endpoint calls what really answered
    cut: bool  # by max_tokens


@dataclasses.dataclass
class Traffic:
    """What a client did so far."""

    sent: int = 0  # attempts
    failed: int = 0  # of them
    from_cache: int = 0


class Client:
    """Asks one endpoint. `close` it in the event loop that used it."""

    def __init__(self, endpoint: Endpoint, answers: AnswerCache):
        """Asks nothing yet.

        Raises:
            ValueError: the environment names a proxy that cannot be used.
        """
        self.endpoint, self.traffic = endpoint, Traffic()
        self._answers = answers
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._free_at = 0.0  # monotonic time before which the endpoint wants no request
        self._url = endpoint.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self._proxy = proxy_of(self._url)
        self._http = _http_client(endpoint, self._proxy)

    async def close(self) -> None:
        """Closes all connections."""
        await self._http.aclose()

    async def ask(
        self, messages: Sequence[Message], *, temperature: float, max_tokens: int, seed: int, top_p: float = 1.0
    ) -> Answer:
        """One answer.

        Args:
            seed: sent with the request; also tells apart requests that are alike otherwise.

        Raises:
            ContextFull: the messages are too long for the model.
            Unavailable: no answer before the deadline.
            EndpointError: a refusal that no other attempt would change.
        """
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": [dict(message) for message in messages],
            "temperature": temperature,
            "max_tokens": max_tokens,
            "seed": seed,
            "stream": False,
        }
        body |= {"top_p": top_p} if top_p < 1 else {}
        body = {name: value for name, value in (body | dict(self.endpoint.extra)).items() if value is not None}
        key = request_key(self._url, body, seed)
        known = self._answers.get(key)
        if known is not None:
            self.traffic.from_cache += 1
            return _answer(known)
        async with self._slots:
            found = await self._insist(body)
        self._answers.put(key, body, found)
        return _answer(found)

    async def _insist(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The response's JSON, by as many attempts as the deadline allows."""
        first = self.endpoint.first_wait
        backoff = tenacity.wait_exponential_jitter(first, LONGEST_WAIT, jitter=first)
        last: list[BaseException] = []

        def wait(state: tenacity.RetryCallState) -> float:
            assert state.outcome is not None
            last.append(state.outcome.exception() or _Passing("no answer"))
            return max(backoff(state), getattr(last[-1], "pause", 0.0))

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_Passing),
            wait=wait,
            stop=tenacity.stop_before_delay(self.endpoint.deadline),
            reraise=True,
        )
        try:
            async with asyncio.timeout(self.endpoint.deadline):
                return await retrying(self._attempt, body)
        except (_Passing, TimeoutError) as error:
            cause = error if isinstance(error, _Passing) else (last or [_Passing("no answer")])[-1]
            told = str(cause).rstrip(".")
            raise Unavailable(
                f"{self._url}: no answer within {self.endpoint.deadline:g} s; the last attempt ended with: {told}. "
                f"See whether the endpoint is up, or raise --config.remote.deadline"
            ) from None

    async def _attempt(self, body: Mapping[str, Any]) -> dict[str, Any]:
        while (pause := self._free_at - time.monotonic()) > 0:
            await asyncio.sleep(pause)
        self.traffic.sent += 1
        try:
            response = await self._http.post(self._url, json=body)
            return self._checked(response)
        except _Passing:
            self.traffic.failed += 1
            raise
        except httpx.InvalidURL as error:
            raise EndpointError(
                f"{self._url}: is no address ({error}); expected e.g. http://127.0.0.1:8000/v1"
            ) from None
        except httpx.UnsupportedProtocol:
            raise EndpointError(f"{self._url}: expected an address that begins with http:// or https://") from None
        except httpx.RequestError as error:  # transport, decoding of the body, too many redirects
            self.traffic.failed += 1
            raise self._not_answered(error) from None

    def _checked(self, response: httpx.Response) -> dict[str, Any]:
        """The JSON object of a completion.

        Raises:
            _Passing, EndpointError: it is none.
        """
        pause = pause_of(response.headers, time.time())
        self._free_at = max(self._free_at, time.monotonic() + pause)
        text = self._hide(response.content.decode("utf-8", "replace"))
        if response.status_code == 200:
            found = _parsed(text)
            if _is_completion(found):
                return found
            raise _Passing(f"a body that is no chat completion: {_short(text)}", pause)
        told = f"status {response.status_code}: {_short(text)}"
        passing = response.status_code in _PASSING or response.status_code >= 500
        if self._proxy and _is_of_proxy(self._proxy, response.status_code, text):
            raise self._refused_by_proxy(f"answered with {told}", response.status_code, pause)
        if passing and "insufficient_quota" not in text:
            raise _Passing(told, pause)
        if response.status_code in (400, 413, 422) and any(word in text.lower() for word in _FULL):
            raise ContextFull(f"{self._url}: {told}")
        through = f" (asked through {self._proxy}: if that refuses, {self._proxy.remedy})" if self._proxy else ""
        raise EndpointError(f"{self._url}: {told}{through}; {_remedy(response.status_code)}")

    def _not_answered(self, error: httpx.RequestError) -> Exception:
        """What to raise of an attempt that brought no response."""
        told = self._hide(f"{type(error).__name__} {error}".strip())
        if not self._proxy:
            return _Passing(told)
        if isinstance(error, httpx.ProxyError):  # no tunnel
            found = re.match(r"[45]\d\d", str(error))
            return self._refused_by_proxy(f"opens no connection ({told})", int(found[0]) if found else 502)
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout) and not re.search("SSL|CERT", told):
            return _Passing(f"{self._proxy} cannot be reached ({told}); start it, or unset {self._proxy.variable}")
        return _Passing(f"{told} (asked through {self._proxy})")

    def _refused_by_proxy(self, what: str, status: int, pause: float = 0.0) -> Exception:
        remedy = self._proxy.remedy if self._proxy else ""
        if status == 407:
            remedy = f"it wants a user and a password: http://USER:PASSWORD@HOST:PORT in its variable; or {remedy}"
        told = f"{self._proxy} {what}; {remedy}"
        passing = status in _PASSING or status >= 500
        return _Passing(told, pause) if passing else EndpointError(f"{self._url}: {told}")

    def _hide(self, text: str) -> str:
        """The text without the API key, which some servers repeat."""
        return text.replace(self.endpoint.key, "***") if len(self.endpoint.key) >= _SHORTEST_KEY else text


def _http_client(endpoint: Endpoint, proxy: Proxy | None) -> httpx.AsyncClient:
    given: dict[str, Any] = {"limits": httpx.Limits(max_connections=endpoint.concurrency)}
    try:
        if proxy and proxy.fault:
            raise ValueError(proxy.fault)
        # A transport of its own has no proxy; SSL_CERT_FILE and the like count either way.
        how = {"proxy": proxy.url, **given} if proxy else {"transport": httpx.AsyncHTTPTransport(**given)}
        headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
        return httpx.AsyncClient(timeout=endpoint.timeout, headers=headers, **how)
    except (ImportError, httpx.InvalidURL, ValueError) as error:
        if proxy is None:
            raise
        told = "pip install socksio, which SOCKS needs" if isinstance(error, ImportError) else str(error)
        raise ValueError(
            f"{proxy} cannot be used for {endpoint.url} ({told}); expected an address such as http://HOST:PORT, or "
            f"{proxy.host} in NO_PROXY"
        ) from None


def _is_of_proxy(proxy: Proxy, status: int, text: str) -> bool:
    """Whether a proxy made the answer that it should have brought: endpoints explain what they refuse in JSON."""
    return status == 407 or (not proxy.tunnel and status >= 400 and not isinstance(_parsed(text), dict))


def _remedy(status: int) -> str:
    if status in (401, 403):
        return "name the environment variable that holds the API key with --config.remote.policy.key_env (or .user.)"
    if status in (301, 302, 307, 308, 404, 405):
        return "expected the base address of an OpenAI-compatible server, often ending in /v1, and a model that it has"
    return "fields that the endpoint doesn't take can be removed with --config.remote.policy.extra (or .user.)"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_completion(found: Any) -> bool:
    try:
        message = found["choices"][0]["message"]
        return isinstance(message, dict) and isinstance(message.get("content"), str | None)
    except (KeyError, IndexError, TypeError):
        return False


def _answer(found: Mapping[str, Any]) -> Answer:
    choice = found["choices"][0]
    message, usage = choice["message"], found.get("usage")
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    return Answer(
        text=message.get("content") or "",
        reasoning=reasoning if isinstance(reasoning, str) else "",
        prompt_tokens=_count(usage, "prompt_tokens"),
        completion_tokens=_count(usage, "completion_tokens"),
        model=str(found.get("model") or ""),
        cut=choice.get("finish_reason") == "length",
    )


def _count(usage: Any, name: str) -> int:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) else 0


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:300] + "…"
