"""Training by several processes whose users answer by text: what one process does, and one message for a fault."""

import json
import time

import pytest

from configs import debug
from rlver_jax.training import announced
from tests.endpoints.server import ChatServer
from tests.parallel.processes import processes
from tests.parallel.test_processes import finish
from tests.training.test_remote_users import FIELDS, STEPS, records_of, rows_of
from tests.training.test_two_tokenizers import make_bpe_world

pytestmark = pytest.mark.slow


def start(count: int, workdir, **more):
    """A training of eight devices by so many processes."""
    fields = [f"--config.{name}={value}" for name, value in (FIELDS | more).items()]
    config = f"--config={debug.__file__}"
    return processes(count, 8 // count, "rlver_jax.train", config, f"--workdir={workdir}", *fields)


def check_equal(pair, alone) -> None:
    """The same dialogues before the first update, and the same run within rounding."""
    assert [row["step"] for row in rows_of(pair)] == [row["step"] for row in rows_of(alone)] == list(range(STEPS + 1))
    says = [[[m["content"] for m in r["messages"]] for r in records_of(folder, 1)] for folder in (pair, alone)]
    assert says[0] == says[1]
    assert len(json.dumps(says)) > 1000
    for mine, theirs in zip(rows_of(pair), rows_of(alone), strict=True):
        assert mine.keys() == theirs.keys()
        for name in ("policy/loss", "emotion/final_mean", "reward/mean", "eval/score", "remote/cost", "eval/cost"):
            assert mine.get(name) == pytest.approx(theirs.get(name), abs=1e-3), name


def test_users_behind_an_endpoint(tmp_path):
    """Process 0 alone asks, and as often as a process alone; the others wait longer than a pulse for one answer."""
    asked = {}
    for count in (1, 2):
        with ChatServer() as server:
            late = iter([announced.PULSE + 2] * (count > 1))
            server.before = lambda late=late: time.sleep(next(late, 0))
            finish(start(count, tmp_path / str(count), **{"remote.user.url": server.url}))
            asked[count] = sorted(json.dumps(body, sort_keys=True) for body in server.bodies)
    check_equal(tmp_path / "2", tmp_path / "1")
    assert asked[1] == asked[2]
    assert asked[1]


def test_a_refused_key_ends_all(tmp_path):
    with ChatServer() as server:
        server.key = "another"
        with start(2, tmp_path, **{"remote.user.url": server.url}) as members:
            assert [member.ended(300) for member in members] == [1, 1], members[0].printed + members[1].printed
            assert "401" in members[0].printed
            assert "Traceback" not in members[0].printed + members[1].printed


@pytest.mark.long
def test_users_with_another_tokenizer(tmp_path, bpe_folder, bpe):
    world = tmp_path / "world"
    world.mkdir()
    make_bpe_world(world, bpe_folder, bpe)
    user = {"user.path": world, "remote.user.model": ""}
    for count in (1, 2):
        finish(start(count, tmp_path / str(count), **user))
    check_equal(tmp_path / "2", tmp_path / "1")
