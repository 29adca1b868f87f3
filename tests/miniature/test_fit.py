"""Fitting: the loss over the positions that have a target, and parameters that follow its gradient."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from rlver_jax.miniature import fit
from rlver_jax.miniature.sequences import TrainingSequence, stack


def batch_of(seed: int):
    """Two sequences of random tokens, of which some are learned."""
    draw, made = np.random.default_rng(seed), []
    for _ in range(2):
        sequence = TrainingSequence()
        position = sequence.add_context([int(t) for t in draw.integers(0, 40, 6)], 0, 0)
        sequence.add_targets([int(t) for t in draw.integers(0, 40, 5)], 0, position)
        made.append(sequence)
    return stack(made, 16)


def test_target_positions_are_all_targets_and_no_more():
    target = np.array([[-1, 5, -1, -1], [0, -1, -1, -1], [-1, -1, -1, -1]], np.int32)
    positions, tokens = fit.target_positions(target)
    assert (positions.tolist(), tokens.tolist()) == ([1, 4, 0, 0, 0], [5, 0, -1, -1, -1])
    with pytest.raises(ValueError, match="4 of 4 positions have a target; raise fit.LEARNED"):
        fit.target_positions(np.ones((2, 2), np.int32))


def test_fit_reports_the_mean_cross_entropy_and_learns():
    """Against NumPy's log-softmax of the untrained model's scores."""
    model, batch = fit.small_model(40, hidden=16, mlp=32, layers=1), batch_of(0)
    quiet = {"console": Console(file=io.StringIO()), "name": "x", "learning_rate": 1e-2}
    first, loss = fit.fit(model, lambda step: batch, 1, **quiet)
    start = fit.init_params(model, jax.random.key(0))
    hidden = model.apply({"params": start}, batch.tokens, batch.positions, batch.branch)[0]
    scores = np.asarray(hidden @ start["embed"]["kernel"].T, np.float64)
    logp = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    wanted = [-logp[b, i, batch.target[b, i]] for b in range(2) for i in range(16) if batch.target[b, i] >= 0]
    assert len(wanted) == 10
    assert loss == pytest.approx(np.mean(wanted), rel=1e-5)
    again, lower = fit.fit(model, lambda step: batch, 60, params=first.params, **quiet)
    assert lower < loss / 2
    assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), again.params))
