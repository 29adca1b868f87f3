"""Says so, once in a while, when an endpoint gives nothing but faults: whoever waits should know why."""

import logging
import time

NOTICE = 30.0  # seconds of faults before the first line, and between two
_log = logging.getLogger(__name__)


class Silence:
    """The time since an endpoint's last answer."""

    def __init__(self, endpoint: str, deadline: float):
        """Of an endpoint's address, as it may be shown; requests are tried again for `deadline` seconds."""
        self._endpoint, self._deadline = endpoint, deadline
        self._since = self._told = 0.0
        self._attempts = 0

    def end(self) -> None:
        """An answer has come, or a refusal."""
        self._attempts = 0

    def fault(self, reason: str) -> None:
        """An attempt has failed."""
        now = time.monotonic()
        if not self._attempts:
            self._since = self._told = now
        self._attempts += 1
        if now - self._told >= NOTICE:
            self._told = now
            seconds, last = now - self._since, reason.rstrip(".")
            _log.warning(
                f"{self._endpoint}: no answer for {seconds:.0f} s; {self._attempts} attempts failed, the last with: "
                f"{last}. Each request is tried again until remote.deadline={self._deadline:g} s"
            )
