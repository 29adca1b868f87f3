"""Bodies of 4 MB of every kind, several at once, against a running server: how long GET /health takes meanwhile.

    python tests/serving/stall.py --url=http://127.0.0.1:8000 [--senders=4] [--seconds=30]

The figures are printed as JSON; exit status 1 where a body got status 500 or /health took longer than 0.1 s. Bodies
are made before, and /health is asked from a process of its own, so that what is measured is the server.
"""

import argparse
import collections
import http.client
import json
import multiprocessing
import sys
import threading
import time
from typing import Any
from urllib.parse import urlsplit

SIZE = 4 << 20


def filled(before: str, unit: str, after: str) -> bytes:
    """A body of nearly 4 MiB: `unit` again and again."""
    rest = SIZE - len((before + after).encode())
    return (before + unit * (rest // len(unit.encode())) + after).encode()


def bodies(model: str) -> dict[str, tuple[str, bytes]]:
    """(path, body) by kind."""
    chat, complete = "/v1/chat/completions", "/v1/completions"
    name = f'"model":{json.dumps(model)}'
    text, prompt = f'{{{name},"messages":[{{"role":"user","content":"', f'{{{name},"prompt":'
    units = {
        "one letter": "a",
        "spaces": " ",
        "digits": "1",
        "marks": "!",
        "words": "so my boss did not listen ",
        "知": "知",
    }
    units |= {"escapes": "\\u00e9", "newlines": " \\n", "specials": "<|im_end|>", "backslashes": "\\\\"}
    by_kind = {f"one message of {kind}": (chat, filled(text, unit, '"}]}')) for kind, unit in units.items()}
    lists = {"ids": "1,", "long ids": "12345,", "floats": "1.5,", "lists": "[],", "deep lists": "[[[[[]]]]],"}
    lists |= {"objects": "{},", "texts": '"a",', "long texts": '"' + "b " * 4000 + '",'}
    by_kind |= {f"a prompt of {kind}": (complete, filled(prompt + "[", unit, "1]}")) for kind, unit in lists.items()}
    by_kind["messages"] = chat, filled(f'{{{name},"messages":[', '{"role":"user","content":"a"},', "1]}")
    by_kind["parts"] = chat, filled(text[:-1] + "[", '{"type":"text","text":"a"},', '""]}]}')
    by_kind["stops"] = chat, filled(f'{{{name},"stop":[', '"stop",', '"a"]}')
    by_kind["fields"] = chat, ("{" + ",".join(f'"{i}":1' for i in range(380_000)) + "}").encode()
    by_kind["a deep list"] = chat, b"[" * SIZE
    by_kind["a long number"] = chat, filled(f'{{{name},"seed":', "9", "}")
    by_kind["white space"] = chat, filled("{", " ", "}")
    by_kind["a long name"] = chat, filled('{"model":"', "m", '"}')
    most = 65_000  # just what is still taken
    by_kind["as many texts"] = complete, (prompt + "[" + '"a",' * most + '"a"]}').encode()
    by_kind["as many lists"] = complete, (prompt + "[" + "[1]," * most + "[1]]}").encode()
    by_kind["as many ids"] = complete, (prompt + "[" + "17," * 262_000 + "1]}").encode()
    by_kind["as many messages"] = (
        chat,
        (text[: text.index("[") + 1] + ",".join(['{"role":"user","content":"a"}'] * 8192) + "]}").encode(),
    )
    return by_kind


def ask(url: str, until: float, waits: Any) -> None:
    """/health every 10 ms, on new and on kept connections."""
    netloc, reused, latencies = urlsplit(url).netloc, None, []
    while time.time() < until:
        connection = reused or http.client.HTTPConnection(netloc, timeout=60)
        began = time.perf_counter()
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b'{"status":"ok"}'
        latencies.append(time.perf_counter() - began)
        reused = None if reused else connection
        time.sleep(0.01)
    waits.put(latencies)


def send(url: str, all_bodies: list[tuple[str, bytes]], first: int, until: float, seen: list[int]) -> None:
    """One body after the other."""
    at = first
    while time.time() < until:
        path, body = all_bodies[at % len(all_bodies)]
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        json.loads(response.read())
        seen.append(response.status)
        connection.close()
        at += 1


def run(url: str, senders: int = 4, seconds: float = 30, kind: str = "") -> dict[str, Any]:
    """Figures of so many seconds; `kind`: of this kind of body only."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.request("GET", "/v1/models")
    made = bodies(json.loads(connection.getresponse().read())["data"][0]["id"])
    chosen = [made[kind]] if kind else list(made.values())
    context = multiprocessing.get_context("spawn")
    waits, seen, until = context.Queue(), [], time.time() + seconds
    prober = context.Process(target=ask, args=(url, until, waits))
    prober.start()
    each = len(chosen) // senders or 1
    threads = [threading.Thread(target=send, args=(url, chosen, n * each, until, seen)) for n in range(senders)]
    for thread in threads:
        thread.start()
    latencies = sorted(waits.get(timeout=seconds + 120))
    prober.join()
    for thread in threads:
        thread.join()
    indices = {"median": len(latencies) // 2, "p99": int(0.99 * (len(latencies) - 1)), "max": -1}
    return {
        "kinds": len(chosen),
        "bodies": len(seen),
        "status": dict(collections.Counter(seen)),
        "asked": len(latencies),
        "health_ms": {name: round(1e3 * latencies[index], 1) for name, index in indices.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--senders", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--kind", default="", help="only this kind; `all`: one kind after the other")
    args = parser.parse_args()
    kinds = bodies("").keys() if args.kind == "all" else [args.kind]
    worst = 0.0
    for kind in kinds:
        results = run(args.url, args.senders, args.seconds, kind)
        print(json.dumps({"kind": kind or "every"} | results, ensure_ascii=False))
        worst = max(worst, results["health_ms"]["max"], 1e9 * (500 in results["status"]))
    return 1 if worst > 100 else 0


if __name__ == "__main__":
    sys.exit(main())
