"""Whether a reply follows its item's instruction; read by lm-evaluation-harness through ifeval_local.yaml."""

import json
import re


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """{"followed": 0 or 1} of one item and the model's reply."""
    return {"followed": float(follows(doc["kind"], doc["value"], results[0].strip()))}


def follows(kind: str, value: str, reply: str) -> bool:
    """Whether the reply, which must not be empty, is of the kind."""
    checks = {
        "no_comma": lambda: not re.search("[,，]", reply),
        "lowercase": lambda: reply == reply.lower(),
        "keyword": lambda: value.lower() in reply.lower(),
        "at_most_words": lambda: len(reply.split()) <= int(value),
        "ends_with": lambda: reply.endswith(value),
        "bullets": lambda: len(re.findall(r"^\s*[*-] ", reply, re.MULTILINE)) == int(value),
        "title": lambda: bool(re.search(r"<<[^\n<>]+>>", reply)),
        "json": lambda: _is_json(reply),
    }
    return bool(reply) and checks[kind]()


def _is_json(text: str) -> bool:
    try:
        json.loads(re.sub(r"^```(?:json)?\s*|\s*```$", "", text))
    except ValueError:
        return False
    return True
