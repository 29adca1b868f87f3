"""What headers of real endpoints ask for, in seconds computed by hand."""

import pytest

from rlver_jax.endpoints.rate_limits import duration, pause_of


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 60),  # RFC 9110's own date, a minute from now
        ({"retry-after": "Wed, 21 Oct 2015 07:26:00 GMT"}, 0),  # past
        ({"retry-after": "soon"}, 0),
        ({"retry-after-ms": "250", "retry-after": "0"}, 0.25),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m0.5s"}, 60.5),
        ({"x-ratelimit-remaining-requests": "1", "x-ratelimit-reset-requests": "1m"}, 0),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "17ms"}, 0.017),
    ],
)
def test_pauses(headers, seconds):
    now = 1445412420  # 2015-10-21 07:27:00 UTC
    assert pause_of(headers, now) == pytest.approx(seconds)


def test_durations():
    assert duration("6m0s") == 360
    assert duration("1h2m3s") == 3723
    assert duration("2d") == 172800
    assert duration("12") == 12
    assert duration("a while") == 0
