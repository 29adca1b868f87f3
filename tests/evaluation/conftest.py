"""Dialogues in SAGE's schema, made up."""

import pytest


def result(number: int, changes: list[int], *, start: int = 40, limit: bool = False) -> dict:
    """One of SAGE's results; with `limit`, a last reply that nobody appraised."""
    emotion, history = start, [{"role": "user", "content": "my boss did not listen.", "emotion-point": start}]
    says = ["my sister felt awful", "I felt awful", "said goodbye", "not 2024", "知道"]
    for i, change in enumerate(changes):
        emotion = min(100, max(0, emotion + change))
        history.append({"role": "assistant", "content": says[(i + number) % len(says)]})
        planning = {"activity": "hm", "TargetCompletion": "partly", "content": "a", "analyse": "b", "change": change}
        reply = {"role": "user", "content": ["and she", "I"][i % 2], "thinking": "aloud", "planning": planning}
        history.append(reply | {"emotion-point": emotion})
    if limit:
        history.append({"role": "assistant", "content": "she"})
    return {
        "id": f"p{number}",
        "emo_point": emotion,
        "emo_state": "Emotion-B",
        "target": "eq",
        "player": "my sister " * (number + 1),
        "scene": "said goodbye",
        "character": "calm",
        "topic": "t",
        "task": "be heard",
        "history": history,
    }


@pytest.fixture(scope="session")
def results():
    """Four dialogues of different lengths; the second ends in success, the third in failure."""
    changes = [[5, -3, 0], [10] * 6, [-10, -10, -10, -5], [4]]
    return [result(i, each, limit=i == 0) for i, each in enumerate(changes)]
