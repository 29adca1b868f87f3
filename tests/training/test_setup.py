"""How a run's rows are read: lengths that may be compiled, and what one device holds of a microbatch."""

import jax
import numpy as np
import pytest

from configs import debug
from rlver_jax.decoding.cache import LM
from rlver_jax.learning.sequences import max_length
from rlver_jax.models.architecture import Qwen2Config
from rlver_jax.models.qwen import Qwen2
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.rollout.agents import Agents
from rlver_jax.rollout.spec import RolloutConfig
from rlver_jax.training.setup import build_run, dialogues_a_row, reads_at_most, row_lengths


def config_of(**fields):
    config = debug.get_config()
    config.update_from_flattened_dict({name.replace("__", "."): x for name, x in fields.items()})
    return config


@pytest.mark.parametrize(
    ("fields", "devices", "fit", "reads"),
    [
        ({}, 1, 2, 4),  # eight rows at a time otherwise: now one of twice the length, four times
        ({}, 4, 2, 1),
        ({}, 8, 1, 1),  # a row for each device, and no room for more
        ({"train__microbatches": 2}, 4, 1, 2),
        ({"train__microbatches": 8}, 1, 1, 8),
        ({"train__share_rows": False, "train__microbatches": 2}, 1, 1, 2),
    ],
)
def test_a_device_never_reads_more_at_a_time_than_it_has_room_for(fields, devices, fit, reads):
    config, mesh = config_of(**fields), make_mesh(1, devices, 1, devices=jax.devices()[:devices])
    assert dialogues_a_row(config, mesh) == fit
    assert reads_at_most(config, mesh, config.rollout.batch) == reads


def test_lengths_are_spread_up_to_the_longest_row(bpe, prompts):
    spec = RolloutConfig(
        mode="think", enforce_format=False, group=1, max_turns=2, context=768, think_tokens=24, say_tokens=12,
        user_tokens=8,
    )  # fmt: skip
    lm = LM({}, Qwen2(Qwen2Config(bpe.vocab_size, 8, 8, 1, num_heads=1, num_kv_heads=1, head_dim=8)))
    agents = Agents.build(lm, lm, bpe, prompts, spec, style="vanilla", scenario="heart_to_heart")
    longest = max_length(agents.tables[0], spec, 10)
    one = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    for fields, most in (({}, 2 * longest), ({"train__share_rows": False}, longest)):
        found = np.array(row_lengths(config_of(train__length_buckets=8, **fields), agents, 10, one))
        assert not (found % 64).any()
        assert most <= found[-1] < most + 64
        assert (found[1:] <= np.maximum(found[:-1] * 9 / 8, found[:-1] + 64)).all(), "an eighth more, or 64"
        assert (np.diff(found) > 0).all()
    found = row_lengths(config_of(train__length_buckets=1), agents, 10, one)
    assert found[:-1] == tuple(64 << i for i in range(len(found) - 1))


def test_kernels_for_tpu_are_refused_elsewhere():
    config = config_of(critic__attention="splash")
    with pytest.raises(ValueError, match="critic.attention='splash' is made of kernels for TPU, but the devices are"):
        build_run(config, make_mesh(1, 1, 1, devices=jax.devices()[:1]))
