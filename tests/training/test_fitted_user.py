"""A fitted user on the policy's base: one copy of it, an adapter of each role, its scores, and what a plan counts."""

import jax
import numpy as np
import pytest

from rlver_jax import verify
from rlver_jax.decoding.cache import LM
from rlver_jax.models.hf_weights import load_params
from rlver_jax.models.lora import LoRA, split
from rlver_jax.models.peft_files import save_adapter, with_adapter
from rlver_jax.perf.plan_programs import USERS_ADAPTER, Texts, bytes_per_chip, programs_of, shapes_of
from rlver_jax.training.setup import build_run
from tests.conftest import plain, write_debug_model
from tests.models.test_lora import drawn
from tests.training.test_lora import config_of, one_device, run

LORA = LoRA(3, 6.0, ("q", "v", "up"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a model and of an adapter on it, and the model."""
    folder = tmp_path_factory.mktemp("fitted")
    model = write_debug_model(folder / "model")
    save_adapter(folder / "adapter", drawn(model, LORA), model.config, LORA, base="BASE")
    return folder / "model", folder / "adapter", model


def fitted(folders, **fields):
    return config_of(folders[0], user__adapter=str(folders[1]), **fields)


def test_it_reads_the_policys_base(folders):
    made, _ = build_run(fitted(folders), one_device())
    base, adapter = split(made.agents.user.params)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (base, made.base.policy)), strict=True))
    assert set(adapter["layer_0"]) == {"attn", "up"}
    merged = with_adapter(load_params(*folders[::2]), folders[2], folders[1])
    rows = [[5, 9, 2, 30, 7, 8, 11], [3, 1, 4, 1, 5, 9, 2, 6]]
    unmerged = plain(made.agents.user, rows)[1]
    for actual, wanted in zip(unmerged, plain(LM(merged, folders[2]), rows)[1], strict=True):
        np.testing.assert_allclose(actual, wanted, atol=1e-5)
    assert max(np.abs(a - b).max() for a, b in zip(unmerged, plain(made.agents.policy, rows)[1], strict=True)) > 0.01


def test_without_adapters_of_the_policy_it_has_weights_of_its_own(folders):
    """All parameters are trained: the policy leaves the base, so there is nothing to share."""
    made, _ = build_run(fitted(folders, lora__rank=0), one_device())
    assert not split(made.agents.user.params)[1]


def test_a_plan_counts_the_base_once(folders):
    mesh, config = one_device(), fitted(folders)
    made, state = build_run(config, mesh)
    tokens = made.tokens
    texts = Texts(made.agents.tokenizer, config.data.language, tokens.prefix_width, tokens.first_width)
    programs = {program.name: program for program in programs_of(shapes_of(config, mesh, texts))}
    held = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    base, adapter = held(made.base.policy), held(split(made.agents.user.params)[1])
    assert list(programs) == ["play", "pack", "learn"]
    play, learn = programs["play"], programs["learn"]
    assert bytes_per_chip(play.arguments) == base + held(state.params) + adapter
    assert bytes_per_chip(play.again) == base
    assert bytes_per_chip(learn.idle[USERS_ADAPTER]) == adapter
    assert bytes_per_chip(learn.arguments) == base + held(state.params) + held(state.opt_state)


@pytest.mark.slow
def test_its_log_is_recomputed(folders, tmp_path):
    """By a user whose weights are merged: log-probs of the two agree."""
    workdir = run(fitted(folders, train__steps=1), tmp_path / "run")
    flags = [f"--config.{side}.path={folders[0]}" for side in ("policy", "user")]
    flags += [f"--config.{side}.init=path" for side in ("policy", "user")]
    log = str(workdir / "dialogues" / "step_000001.jsonl")
    words = [log, "--config=configs/debug.py:ppo", *flags, "--config.train.steps=1"]
    assert verify.main([*words, f"--config.user.adapter={folders[1]}"]) == 0
    assert verify.main(words) == 1, "another user than played"
