"""What fields of an endpoint may hold: an address, a JSON object."""

import json
import re
from urllib.parse import urlsplit


def is_address(url: str) -> bool:
    """Whether it is http:// or https:// with a host that can be looked up, and a port if any is given."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".").encode("idna").decode()
        return (
            parts.scheme in ("http", "https") and parts.port != 0 and bool(re.fullmatch(r"[\w.:%-]+", host, re.ASCII))
        )
    except (ValueError, UnicodeError):  # a bracket alone, a port that is none, a name with an empty part
        return False


def object_fault(text: str) -> str:
    """Why a text is no JSON object that can be sent; empty: it is."""
    try:
        parsed = json.loads(text)
        json.dumps(parsed, ensure_ascii=False, allow_nan=False).encode()
    except json.JSONDecodeError as error:
        return f"is no JSON ({error})"
    except UnicodeError:
        return "holds half a character"
    except ValueError:  # NaN, infinity, or thousands of digits
        return "holds a number that JSON doesn't have"
    except RecursionError:
        return "is nested too deep"
    return "" if isinstance(parsed, dict) else f"is of type {type(parsed).__name__}"
