"""The simulated users of a training run behind an OpenAI-compatible endpoint. Needs the extra `remote`.

Of several processes the first one asks them (see `announced`).
"""

import asyncio
import concurrent.futures
from collections.abc import Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from rlver_jax.dialogues.device_agents import TextPolicy
from rlver_jax.dialogues.endpoint_agents import RemoteUserSide
from rlver_jax.dialogues.rounds import PolicyInRounds, Waits, play_rounds
from rlver_jax.dialogues.turn_by_turn import Row
from rlver_jax.dialogues.verify_settings import TEXT
from rlver_jax.endpoints.answer_cache import AnswerCache
from rlver_jax.endpoints.client import Client
from rlver_jax.endpoints.usage import priced, summed
from rlver_jax.evaluation.endpoint_play import ANSWERS, endpoint_of, prices_of, remote_user
from rlver_jax.profiles.schema import Profile
from rlver_jax.rollout.spec import RolloutConfig
from rlver_jax.training.announced import Announcer

_TRAFFIC = ("sent", "failed", "from_cache")


class RemoteUsers:
    """Asked from one thread, which holds the event loop, the connections and the file of answers of the whole run."""

    readout = TEXT

    def __init__(self, config: ConfigDict, workdir: Path):
        """Asks nothing yet.

        Args:
            workdir: holds the answers unless remote.cache names another file.

        Raises:
            ValueError: the API key is missing, or the file of answers cannot be used.
        """
        self.config = config
        self._prices = prices_of(config, "user")
        self._loop_thread, self._device_thread = (concurrent.futures.ThreadPoolExecutor(1) for _ in range(2))
        self._task: asyncio.Task | None = None
        self._ended = False
        self._counted = dict.fromkeys(_TRAFFIC, 0)
        try:
            self._in_loop(self._open, workdir)
        except BaseException:
            self._end_threads()
            raise

    def _open(self, workdir: Path) -> None:
        endpoint = endpoint_of(self.config, "user")
        self._answers = AnswerCache(self.config.remote.cache or workdir / ANSWERS)
        self._client = Client(endpoint, self._answers)
        self._runner = asyncio.Runner()

    def _in_loop(self, function, *args):
        return self._loop_thread.submit(function, *args).result()

    def of(self, profiles: Sequence[Profile], spec: RolloutConfig) -> "RemoteUsers":
        """The same users: they read profiles when they are asked."""
        return self

    def play(self, rows: Sequence[Row], policy: TextPolicy, spec: RolloutConfig, seed: int) -> Waits:
        """Plays rows to their ends; whoever interrupts it ends its requests.

        Args:
            seed: of the requests.

        Raises:
            EndpointError: the endpoint refuses whatever it is asked; what has been answered is in the cache.
        """
        side = RemoteUserSide(remote_user(self.config, self._client, spec.rules.initial), seed)
        announcer = Announcer(policy) if jax.process_count() > 1 else None
        playing = self._loop_thread.submit(self._runner.run, self._play(rows, announcer or policy, side, spec))
        try:
            return announcer.lead(playing, rows, self.costs) if announcer else playing.result()
        except KeyboardInterrupt:
            self.cancel()
            concurrent.futures.wait([playing])
            raise

    async def _play(
        self, rows: Sequence[Row], policy: PolicyInRounds, side: RemoteUserSide, spec: RolloutConfig
    ) -> Waits:
        self._task = asyncio.current_task()
        if self._ended:
            raise asyncio.CancelledError
        return await play_rounds(
            rows, policy, side, rules=spec.rules, max_turns=spec.max_turns, thread=self._device_thread
        )

    def cancel(self) -> None:
        """Ends the requests of dialogues that another thread waits for, for good."""
        self._ended = True
        if self._task is not None and not self._task.done():
            self._runner.get_loop().call_soon_threadsafe(self._task.cancel)

    def costs(self, rows: Sequence[Row]) -> dict[str, float]:
        """Counts of all answers that make up the dialogues, those from the cache included, and their cost."""
        used = summed([priced(side.to_json(), self._prices) for row in rows for side in row.usage.values()])
        names = {"prompt_tokens": "tokens_in", "completion_tokens": "tokens_out"}
        return {names.get(name, name): float(value) for name, value in used.items() if name != "models"}

    def traffic(self) -> dict[str, float]:
        """Attempts, those of them that failed, and answers that were in the cache, since the last call."""
        now = {name: getattr(self._client.traffic, name) for name in _TRAFFIC}
        before, self._counted = self._counted, now
        return {name: float(count - before[name]) for name, count in now.items()}

    def close(self) -> None:
        """Ends connections and threads."""
        self._in_loop(self._close)
        self._end_threads()

    def _close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()
        self._answers.close()

    def _end_threads(self) -> None:
        for thread in (self._loop_thread, self._device_thread):
            thread.shutdown(wait=True)
