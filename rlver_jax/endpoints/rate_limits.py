"""How long an endpoint asks to be left alone, by its headers."""

import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PIECE = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


def pause_of(headers: Mapping[str, str], now: float) -> float:
    """Seconds to wait before the next request.

    `Retry-After` holds seconds or a date (RFC 9110), `retry-after-ms` milliseconds; `x-ratelimit-reset-…` counts where
    `x-ratelimit-remaining-…` is 0. What cannot be read asks for nothing.

    Args:
        headers: with names in lower case, or insensitive to it.
        now: seconds since the epoch.
    """
    pauses = [_number(headers.get("retry-after-ms", "")) / 1000, _retry_after(headers.get("retry-after", ""), now)]
    for kind in ("requests", "tokens"):
        if headers.get(f"x-ratelimit-remaining-{kind}", "").strip() == "0":
            pauses.append(duration(headers.get(f"x-ratelimit-reset-{kind}", "")))
    return max(0.0, *pauses)


def duration(text: str) -> float:
    """Seconds of "1m30.5s", "250ms" or "12"; 0 for anything else."""
    text = text.strip()
    if re.fullmatch(f"(?:{_PIECE.pattern})+", text):
        return sum(float(number) * _UNITS[unit] for number, unit in _PIECE.findall(text))
    return _number(text)


def _retry_after(text: str, now: float) -> float:
    if _number(text):
        return _number(text)
    try:
        return parsedate_to_datetime(text).timestamp() - now
    except (ValueError, TypeError, OverflowError):  # the last of a year that clocks don't have
        return 0.0


def _number(text: str) -> float:
    return float(text) if re.fullmatch(r"\s*\d+(?:\.\d+)?\s*", text) else 0.0
