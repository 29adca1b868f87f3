"""Fields of models that are not on the device (docs/remote_users.md); they need the extra `remote`."""

from typing import Any

from rlver_jax.config.schema import COUNT, POSITIVE, SHARE, Field


def endpoint() -> dict[str, Field]:
    """Fields of a model behind an OpenAI-compatible endpoint."""
    price: dict[str, Any] = {"range": COUNT, "unit": "a million tokens", "free": True}
    return {
        "url": Field("", "base address, such as http://127.0.0.1:8000/v1; empty: the model is on the device"),
        "model": Field("", "its name there"),
        "key_env": Field("", "environment variable that holds the API key; empty: none is sent"),
        "extra": Field(
            "", 'JSON object added to each request, such as {"reasoning_effort": "low"}; null removes a field of ours'
        ),
        "price_in": Field(0.0, "of tokens read, in any currency; for the cost in summaries and metrics", **price),
        "price_out": Field(0.0, "of tokens generated", **price),
    }


REMOTE = {
    "policy": endpoint(),
    "user": endpoint(),
    "concurrency": Field(8, "at once, to each endpoint", range=POSITIVE, unit="requests", free=True),
    "cohorts": Field(
        1,
        "train: parts of a batch, at most, that take turns: one decodes while the users of the others answer; pays "
        "where half the rows decode in half the time",
        range=POSITIVE,
    ),
    "timeout": Field(120.0, "for one attempt", range=(0.001, None), unit="seconds", free=True),
    "deadline": Field(
        600.0,
        "for a request with all its attempts; then an evaluation stops, to be resumed, and training leaves the "
        "dialogue out",
        range=(0.001, None),
        unit="seconds",
        free=True,
    ),
    "asks": Field(
        3, "at most, until an answer can be read; then the dialogue ends as unreadable", range=POSITIVE, unit="requests"
    ),
    "cache": Field("", "file that keeps answers by request; empty: answers.sqlite in --out or --workdir", path=True),
    "budget": Field(
        0.0,
        "train: what a run's requests may cost by price_in and price_out; then it saves and stops, to be resumed with "
        "a larger one; 0: any",
        range=COUNT,
        free=True,
    ),
    "unanswered_max": Field(
        0.25,
        "train: largest share of a step's dialogues that may stay unanswered and be left out; beyond it the run saves "
        "and stops",
        range=SHARE,
        free=True,
    ),
}
