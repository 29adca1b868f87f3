"""Asks a model behind an OpenAI-compatible endpoint for chat completions.

Whatever may pass is tried again until a deadline: no connection, a dropped one, a timeout, statuses 408, 409, 425, 429
and 5xx, and bodies that are no completion or too long for one. Waits double, with jitter; `Retry-After` and the
`x-ratelimit-…` headers hold back all requests to the endpoint. A request counts among the concurrent ones
while it waits, so an endpoint in trouble gets fewer of them. A proxy between here and there (`proxy_of`) says things of
its own.

Nothing that is raised here refers to httpx's errors and requests: those hold the API key.
"""

import asyncio
import dataclasses
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2 as httpx
import tenacity

from rlver_jax.config.credentials import Secret, Secrets, basic, guarded, key_fault, secret_values, without_credentials
from rlver_jax.endpoints.answer_cache import AnswerCache, request_key
from rlver_jax.endpoints.body import CODINGS, LONGEST, BodyFault, read_body
from rlver_jax.endpoints.completion import Answer, NoCompletion, answer_of, clean, completion_of, parsed
from rlver_jax.endpoints.errors import ContextFull, EndpointError, Refused, Unavailable
from rlver_jax.endpoints.proxy import Proxy, proxy_of
from rlver_jax.endpoints.rate_limits import pause_of
from rlver_jax.endpoints.silence import Silence

Message = Mapping[str, str]  # role and content
_PASSING = frozenset({408, 409, 425, 429})  # beside 5xx
_OF_CONTENT = frozenset({400, 413, 422, 451})  # may be meant for one request alone
_FULL = ("context_length_exceeded", "context length", "maximum context", "context window", "too many tokens")
LONGEST_WAIT = 30.0  # seconds between two attempts, unless the endpoint asks for more
_TOLD = 300  # characters of a body, in a message

for _name in ("httpx2", "httpcore2"):  # their debug lines hold headers as they come, in which a server may repeat a key
    logging.getLogger(_name).setLevel(logging.WARNING)


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
        extra: fields that are added to every request's body; null removes one of ours. What its fields with names such
            as api_key hold is as secret as the key.
        concurrency: requests at once.
        timeout: seconds that one attempt may take, from its connection to the last byte of its answer.
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

    def __post_init__(self) -> None:
        """Has no secret shown by `repr`."""
        object.__setattr__(self, "key", Secret(self.key))
        object.__setattr__(self, "url", guarded(self.url))
        object.__setattr__(self, "extra", guarded(dict(self.extra)))

    def check(self) -> None:
        """Raises ValueError: the key cannot be sent in a header, or `extra` not in a JSON body."""
        if self.key and (fault := key_fault(self.key)):
            raise ValueError(f"the API key for {without_credentials(self.url)} {fault}")
        try:
            json.dumps(self.extra, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, TypeError, RecursionError) as error:
            reason = type(error).__name__ if isinstance(error, UnicodeError) else str(error)
            raise ValueError(f"the fields added to each request cannot be written as JSON: {reason}") from None


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
            ValueError: the key or `extra` cannot be sent, or the environment names a proxy that cannot be used.
        """
        endpoint.check()
        self.endpoint, self.traffic = endpoint, Traffic()
        self._answers = answers
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._free_at = 0.0  # monotonic time before which the endpoint wants no request
        self._url = endpoint.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self._shown = without_credentials(self._url)  # in messages
        self._proxy = proxy_of(self._url)
        self._silence = Silence(self._shown, endpoint.deadline)
        self._secrets = _secrets_of(endpoint, self._proxy)
        self._http = _http_client(endpoint, self._proxy, self._secrets)

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
            Refused: this request is refused; another one may not be.
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
        known = self._known(key)
        if known is not None:
            self.traffic.from_cache += 1
            return answer_of(known)
        async with self._slots:
            completion = await self._insist(body)
        self._answers.put(key, self._secrets.hide_in(body), completion)
        return answer_of(completion)

    def _known(self, key: str) -> dict[str, Any] | None:
        """What is kept of an earlier answer. What an older version has kept may be no good; it is asked for again."""
        known = self._answers.get(key)
        try:
            return None if known is None else completion_of(known, self._secrets)
        except NoCompletion as error:
            self._answers.reject(key, str(error))
            return None

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
            reason = str(error if isinstance(error, _Passing) else (last or [_Passing("no answer")])[-1]).rstrip(".")
        raise Unavailable(  # here, since a request may have been on its way
            f"{self._shown}: no answer within {self.endpoint.deadline:g} s; the last attempt ended with: {reason}. "
            f"See whether the endpoint is up, or raise --config.remote.deadline"
        )

    async def _attempt(self, body: Mapping[str, Any]) -> dict[str, Any]:
        while (pause := self._free_at - time.monotonic()) > 0:
            await asyncio.sleep(pause)
        self.traffic.sent += 1
        outcome = await self._outcome(body)
        if isinstance(outcome, _Passing):
            self.traffic.failed += 1
            self._silence.fault(str(outcome))
        else:
            self._silence.end()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def _outcome(self, body: Mapping[str, Any]) -> dict[str, Any] | Exception:
        """The completion, or what to raise; returned, so that it refers to no error of httpx's."""
        try:
            async with asyncio.timeout(self.endpoint.timeout):
                return await self._exchange(body)
        except TimeoutError:
            through = f" (asked through {self._proxy})" if self._proxy else ""
            remedy = "a slow server needs a larger remote.timeout or a smaller remote.concurrency"
            return _Passing(f"Timeout: no whole answer within {self.endpoint.timeout:g} s{through}; {remedy}")
        except BodyFault as error:
            return _Passing(self._short(str(error)))
        except httpx.InvalidURL as error:
            reason = self._short(str(error))
            return EndpointError(f"{self._shown}: is no address ({reason}); expected e.g. http://127.0.0.1:8000/v1")
        except httpx.UnsupportedProtocol:
            return EndpointError(f"{self._shown}: expected an address that begins with http:// or https://")
        except (httpx.RequestError, ValueError) as error:  # transport; headers that cannot be read
            return self._not_answered(error)

    async def _exchange(self, body: Mapping[str, Any]) -> dict[str, Any] | Exception:
        async with self._http.stream("POST", self._url, content=_serialized(body)) as response:
            pause = pause_of(response.headers, time.time())
            self._free_at = max(self._free_at, time.monotonic() + pause)
            received, whole = await read_body(response)
            return self._checked(response.status_code, received, whole, pause)

    def _checked(self, status: int, body: bytes, whole: bool, pause: float) -> dict[str, Any] | Exception:
        """What is kept of a completion, or what to raise because it is none."""
        if status == 200 and not whole:
            return _Passing(f"a body of more than {LONGEST / 2**20:g} MiB, which is no answer", pause)
        text = clean(body.decode("utf-8-sig", "replace"))
        if status == 200:
            try:
                return completion_of(parsed(text), self._secrets)
            except NoCompletion as error:
                return _Passing(f"{error}: {self._short(text)}", pause)
        reason = f"status {status}: {self._short(text)}"
        passing = status in _PASSING or status >= 500
        if self._proxy and _is_of_proxy(self._proxy, status, text):
            return self._refused_by_proxy(f"answered with {reason}", status, pause)
        if passing and "insufficient_quota" not in text:
            return _Passing(reason, pause)
        if status in (400, 413, 422) and any(word in text.lower() for word in _FULL):
            return ContextFull(f"{self._shown}: {reason}")
        through = f" (asked through {self._proxy}: if that refuses, {self._proxy.remedy})" if self._proxy else ""
        kind = Refused if status in _OF_CONTENT else EndpointError
        return kind(f"{self._shown}: {reason}{through}; {_remedy(status)}")

    def _not_answered(self, error: Exception) -> Exception:
        """What to raise of an attempt that brought no response."""
        reason = self._short(f"{type(error).__name__} {error}".strip())
        if not self._proxy:
            return _Passing(reason)
        if isinstance(error, httpx.ProxyError):  # no tunnel
            status = re.match(r"[45]\d\d", str(error))
            return self._refused_by_proxy(f"opens no connection ({reason})", int(status[0]) if status else 502)
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout) and not re.search("SSL|CERT", reason):
            return _Passing(f"{self._proxy} cannot be reached ({reason}); start it, or unset {self._proxy.variable}")
        return _Passing(f"{reason} (asked through {self._proxy})")

    def _refused_by_proxy(self, what: str, status: int, pause: float = 0.0) -> Exception:
        remedy = self._proxy.remedy if self._proxy else ""
        if status == 407:
            remedy = f"it wants a user and a password: http://USER:PASSWORD@HOST:PORT in its variable; or {remedy}"
        reason = f"{self._proxy} {what}; {remedy}"
        passing = status in _PASSING or status >= 500
        return _Passing(reason, pause) if passing else EndpointError(f"{self._shown}: {reason}")

    def _short(self, text: str) -> str:
        """The beginning of a server's answer, in a line, without what nobody should read."""
        text = " ".join(self._secrets.hide(clean(text[: 100 * _TOLD])).split())
        return text if len(text) <= _TOLD else text[:_TOLD] + "…"


def _secrets_of(endpoint: Endpoint, proxy: Proxy | None) -> Secrets:
    """What a server or a proxy was sent, may repeat, and nobody should read."""
    urls = [endpoint.url, *([proxy.url] if proxy else [])]
    return Secrets([endpoint.key, *secret_values([endpoint.extra, *urls])], whole=map(basic, urls))


def _http_client(endpoint: Endpoint, proxy: Proxy | None, secrets: Secrets) -> httpx.AsyncClient:
    common: dict[str, Any] = {"limits": httpx.Limits(max_connections=endpoint.concurrency)}
    reason = proxy.fault if proxy else ""
    try:
        if not reason:
            # A transport of its own has no proxy; SSL_CERT_FILE and the like count either way.
            route = {"proxy": proxy.url, **common} if proxy else {"transport": httpx.AsyncHTTPTransport(**common)}
            return httpx.AsyncClient(timeout=None, headers=_headers(endpoint), **route)
    except (ImportError, httpx.InvalidURL, ValueError) as error:
        if proxy is None:
            raise
        of_socks = isinstance(error, ImportError)
        reason = "pip install socksio, which SOCKS needs" if of_socks else secrets.hide(without_credentials(str(error)))
    raise ValueError(  # here, so that it refers to no error that holds the proxy's password
        f"{proxy} cannot be used for {without_credentials(endpoint.url)} ({reason}); expected an address such as "
        f"http://HOST:PORT, or {proxy.host if proxy else 'its host'} in NO_PROXY"
    )


def _headers(endpoint: Endpoint) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Accept-Encoding": CODINGS}
    return headers | ({"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {})


def _serialized(body: Mapping[str, Any]) -> Secret:
    return Secret(json.dumps(body, ensure_ascii=False, separators=(",", ":")))


def _is_of_proxy(proxy: Proxy, status: int, text: str) -> bool:
    """Whether a proxy made the answer that it should have brought: endpoints explain what they refuse in JSON."""
    return status == 407 or (not proxy.tunnel and status >= 400 and not isinstance(parsed(text), dict))


def _remedy(status: int) -> str:
    if status in (401, 403):
        return "name the environment variable that holds the API key with --config.remote.policy.key_env (or .user.)"
    if status in (301, 302, 307, 308, 404, 405):
        return "expected the base address of an OpenAI-compatible server, often ending in /v1, and a model that it has"
    return "fields that the endpoint doesn't take can be removed with --config.remote.policy.extra (or .user.)"
