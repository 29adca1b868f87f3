"""Frequencies of the rotary embedding against values worked out by hand in float64."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.models.attention import rotate
from rlver_jax.models.families import PRESETS, Qwen2Config
from rlver_jax.models.rope import Frequencies, RopeScaling, frequencies

CARD = RopeScaling("yarn", factor=4.0, original_max_position_embeddings=32_768)  # Qwen2.5's model card


def plain(theta, dim):
    return theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


@pytest.mark.parametrize(("theta", "dim"), [(1e6, 128), (1e6, 64), (1e4, 32)])
def test_without_scaling(theta, dim):
    actual = frequencies(theta, dim)
    assert (actual.inverse.dtype, actual.scale) == (np.float32, 1.0)
    np.testing.assert_allclose(actual.inverse, plain(theta, dim), rtol=3e-7)


def test_yarn_of_the_model_card():
    """Head of 128, theta 1e6: 32 turns in 32,768 positions lie at 23.6 of 64 frequencies, one turn at 39.7."""
    actual = frequencies(1e6, 128, CARD)
    assert actual.scale == pytest.approx(1.1386294361)  # 0.1 ln 4 + 1
    ratio = actual.inverse / plain(1e6, 128)
    np.testing.assert_allclose(ratio[:24], 1, rtol=3e-7)
    np.testing.assert_allclose(ratio[40:], 1 / 4, rtol=3e-7)
    ramp = (np.arange(24, 40) - 23) / 17
    np.testing.assert_allclose(ratio[24:40], 1 - ramp * 3 / 4, rtol=3e-7)


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({"attention_factor": 1.25}, 1.25),
        ({"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0}, 1.2608037774058554 / 1.3688879454113936),
        ({"factor": 40.0, "mscale": 0.707}, 0.1 * math.log(40) + 1),  # alone it means nothing
        ({"factor": 1.0}, 1.0),
    ],
)  # fmt: skip
def test_yarn_scales_cosines(fields, scale):
    scaling = RopeScaling(**{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096} | fields)
    assert frequencies(1e4, 64, scaling).scale == pytest.approx(scale, abs=1e-12)


def test_yarn_with_bounds_of_its_own():
    """16 frequencies, theta 10,000, 1,024 positions: 8 turns lie at 16 log(1024/16π)/log 10⁴ = 5.24, 2 at 7.64."""
    fields = {"beta_fast": 8.0, "beta_slow": 2.0, "original_max_position_embeddings": 1024}
    for truncate, low, high in [(True, 5, 8), (False, 5.236120, 7.644360)]:
        actual = frequencies(1e4, 32, RopeScaling("yarn", 2.0, truncate=truncate, **fields))
        ramp = np.clip((np.arange(16) - low) / (high - low), 0, 1)
        np.testing.assert_allclose(actual.inverse / plain(1e4, 32), 1 - ramp / 2, rtol=2e-5)


def test_linear_and_llama3():
    actual = frequencies(1e6, 64, RopeScaling("linear", 8.0))
    np.testing.assert_allclose(actual.inverse, plain(1e6, 64) / 8, rtol=3e-7)
    assert actual.scale == 1
    scaling = RopeScaling(
        "llama3", 8.0, original_max_position_embeddings=8192, low_freq_factor=1.0, high_freq_factor=4.0
    )
    actual = frequencies(5e5, 128, scaling)  # Llama 3.1's
    turns = 8192 * plain(5e5, 128) / (2 * np.pi)
    weight = np.clip((turns - 1) / 3, 0, 1)
    assert ((weight > 0) & (weight < 1)).sum() == 6
    np.testing.assert_allclose(actual.inverse, plain(5e5, 128) * (weight + (1 - weight) / 8), rtol=3e-6)
    assert actual.scale == 1


def test_rotation_by_hand():
    """Pairs (x[i], x[i + half]) as complex numbers, turned by position times frequency, in float64."""
    draw = np.random.default_rng(0)
    x, positions = draw.normal(size=(2, 5, 3, 64)), np.array([[0, 1, 2, 3, 4], [100, 5_000, 32_768, 60_000, 131_071]])
    rope = frequencies(1e6, 64, CARD)
    actual = rotate(jnp.asarray(x, jnp.float32), jnp.asarray(positions), rope)
    turned = (
        (x[..., :32] + 1j * x[..., 32:])
        * 1.1386294361119891
        * np.exp(1j * positions[..., None, None] * rope.inverse.astype(np.float64))
    )
    wanted = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(actual[0], wanted[0], atol=2e-6)
    np.testing.assert_allclose(actual[1], wanted[1], atol=3e-2)  # an angle of 1e5 has an ulp of 8e-3


def test_nothing_is_computed_for_a_scale_of_one():
    """Models without YaRN run the program that they always ran."""

    def products(rope):
        x, at = jnp.zeros((1, 2, 1, 8)), jnp.zeros((1, 2), jnp.int32)
        return str(jax.make_jaxpr(lambda x, at: rotate(x, at, rope))(x, at)).count(" mul ")

    inverse = plain(1e4, 8).astype(np.float32)
    assert products(Frequencies(inverse)) == 5  # the angle, and four of the rotation
    assert products(Frequencies(inverse, 1.1)) == 7


@pytest.mark.parametrize(
    ("fields", "context"),
    [
        ({}, 32_768),
        ({"rope_scaling": CARD}, 131_072),  # max_position_embeddings stays as it was
        ({"rope_scaling": CARD, "max_positions": 131_072}, 131_072),
        ({"rope_scaling": CARD, "max_positions": 200_000}, 200_000),
        ({"rope_scaling": RopeScaling("linear", 2.0)}, 65_536),
        ({"rope_scaling": RopeScaling("llama3", 8.0, 8192, low_freq_factor=1, high_freq_factor=4)}, 32_768),
    ],
)
def test_how_much_may_be_read(fields, context):
    config = Qwen2Config(96, 32, 48, 2, num_heads=4, num_kv_heads=2, head_dim=8, **fields)
    assert config.context == context
    config.check_context(context, "user", "", "")
    with pytest.raises(
        ValueError, match=f"N=1, but the model of user reads at most {context} tokens .*; do so, or .* YaRN"
    ):
        config.check_context(context + 1, "user", "N=1", "do so")


def test_published_sizes_read_what_their_configs_say():
    assert {config.context for config in PRESETS.values()} == {32_768, 40_960}


def test_unknown_scalings_are_refused():
    with pytest.raises(ValueError, match=r"rope_type='su'; expected one of linear, llama3, yarn"):
        RopeScaling("su", 2.0)


def test_the_golden_model_is_scaled():
    """`test_qwen2` compares its logits with those of transformers; YaRN must make a difference there."""
    folder = Path(__file__).parent / "golden" / "yarn"
    raw = json.loads((folder / "config.json").read_text())
    assert raw["rope_parameters"]["rope_type"] == "yarn"
    config = Qwen2Config.from_hf(folder)
    # 2 turns in 16 positions lie at 0.16 of 6 frequencies, a quarter of a turn at 1.51: bounds 0 and 2.
    ramp = np.clip(np.arange(6) / 2, 0, 1)
    np.testing.assert_allclose(config.rope.inverse, plain(1e4, 12) * (1 - ramp * 3 / 4), rtol=1e-6)
