"""Many clients at once against a running server: errors, speed, how busy its rows are, whether its memory grows.

    python tests/serving/load.py --url=http://127.0.0.1:8000 [--clients=64] [--seconds=120] [--pid=PID]

Each client sends one request after the other, of random kinds: chats and completions, short and long, greedy and warm,
streamed and whole, with stop strings and with log-probabilities. The figures are printed as JSON; exit status 1 where
anything failed. --pid is the server's process, for its memory (Linux).
"""

import argparse
import dataclasses
import http.client
import json
import random
import re
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

WORDS = ["my", "boss", "did", "not", "listen", "and", "felt", "awful", "so", "she", "said", "goodbye", "知道", "不"]
ENDS = ("stop", "length")


@dataclasses.dataclass
class Found:
    """What all clients have seen; lists only grow, so threads need no lock."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)
    rss_mib: list[float] = dataclasses.field(default_factory=list)


def random_request(draw: random.Random, model: str, context: int) -> tuple[str, dict[str, Any]]:
    """(path, body) of a random request that fits."""
    text = " ".join(draw.choices(WORDS, k=draw.randint(1, context // 16)))
    body: dict[str, Any] = {"model": model, "max_tokens": draw.randint(1, context // 8), "seed": draw.randint(0, 99)}
    body |= {"temperature": draw.choice([0, 0.7, 1.3]), "top_p": draw.choice([1, 0.8])}
    if draw.random() < 0.3:
        body["stop"] = draw.sample(WORDS, 2)
    if draw.random() < 0.4:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if draw.random() < 0.5:
        logprobs = {"logprobs": True, "top_logprobs": 3} if draw.random() < 0.3 else {}
        return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]} | logprobs
    return "/v1/completions", body | {"prompt": text} | ({"logprobs": 2} if draw.random() < 0.3 else {})


def checked(status: int, text: str, body: dict[str, Any]) -> int:
    """Tokens of a response. Raises ValueError where it isn't what was asked for."""
    if status != 200:
        raise ValueError(f"status {status}: {text[:200]}")
    if not body.get("stream"):
        answer = json.loads(text)
        choices, usage = answer["choices"], answer["usage"]
    else:
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        if events[-1] != "[DONE]":
            raise ValueError(f"the stream ends with {events[-1][:200]}")
        chunks = [json.loads(event) for event in events[:-1]]
        choices, usage = [c for chunk in chunks for c in chunk["choices"]], chunks[-1]["usage"]
    if choices[-1]["finish_reason"] not in ENDS or not 1 <= usage["completion_tokens"] <= body["max_tokens"]:
        raise ValueError(f"{choices[-1]['finish_reason']} after {usage} of {body['max_tokens']}")
    return usage["completion_tokens"]


def client(number: int, netloc: str, model: str, context: int, until: float, measured_load: Found) -> None:
    """One client: requests until the time is over, each on one kept connection."""
    draw, connection = random.Random(number), http.client.HTTPConnection(netloc, timeout=300)
    while time.monotonic() < until:
        path, body = random_request(draw, model, context)
        began = time.monotonic()
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            measured_load.tokens.append(checked(response.status, response.read().decode(), body))
            measured_load.seconds.append(time.monotonic() - began)
        except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
            measured_load.errors.append(f"{type(error).__name__}: {error}")
            connection.close()


def get(netloc: str, path: str) -> Any:
    connection = http.client.HTTPConnection(netloc, timeout=60)
    connection.request("GET", path)
    return json.loads(connection.getresponse().read())


def rss_mib(pid: int) -> float:
    """Resident memory of a process, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]


def _at(values: list[float], share: float) -> float:
    return values[int(share * (len(values) - 1))]


def run(url: str, clients: int, seconds: float, pid: int = 0) -> dict[str, Any]:
    """Figures of a load of `seconds`."""
    netloc, result = urlsplit(url).netloc, Found()
    model = get(netloc, "/v1/models")["data"][0]
    before, until = get(netloc, "/stats"), time.monotonic() + seconds
    threads = [
        threading.Thread(target=client, args=(n, netloc, model["id"], model["max_model_len"], until, result))
        for n in range(clients)
    ]
    for thread in threads:
        thread.start()
    while time.monotonic() < until:
        time.sleep(min(1.0, seconds / 12))
        if pid:
            result.rss_mib.append(rss_mib(pid))
    for thread in threads:
        thread.join()
    after = get(netloc, "/stats")
    steps = after["steps"] - before["steps"]
    generated = after["tokens"]["generated"] - before["tokens"]["generated"]
    waits = sorted(result.seconds) or [0.0]
    sixth = max(len(result.rss_mib) // 6, 1)
    return {
        "clients": clients,
        "seconds": seconds,
        "requests": len(result.seconds),
        "errors": len(result.errors),
        "first_errors": result.errors[:3],
        "latency_s": {
            "median": statistics.median(waits),
            "p95": _at(waits, 0.95),
            "p99": _at(waits, 0.99),
            "max": waits[-1],
        },
        "tokens_per_s": sum(result.tokens) / seconds,
        "rows": after["rows"],
        "rows_mean": generated / max(steps, 1),
        "occupancy": generated / max(steps, 1) / after["rows"],
        "programs_compiled": [before["programs_compiled"], after["programs_compiled"]],
        "left": {"busy": after["busy"], "waiting": after["waiting"]},
        "rss_mib_at": {name: _at(result.rss_mib, x) for name, x in (("start", 0), ("third", 1 / 3), ("end", 1)) if pid},
        # the second sixth (the first one warms up) and the last one
        "rss_mib": [statistics.mean(x) for x in (result.rss_mib[sixth : 2 * sixth], result.rss_mib[-sixth:]) if x],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--pid", type=int, default=0)
    results = run(**vars(parser.parse_args()))
    print(json.dumps(results, indent=1))
    return 1 if results["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
