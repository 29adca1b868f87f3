"""A packed dialogue is its turns, one row each: the same tokens, visible tokens, log-probs, loss and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlver_jax.learning import loss_terms
from rlver_jax.learning.loss import LossConfig, LossInputs, TrainedModels, action_logprobs, forward, loss
from rlver_jax.learning.sequences import max_length, row_lengths
from rlver_jax.models.attention import AttentionMask, visible
from rlver_jax.models.qwen import logits
from rlver_jax.models.value_head import ValueHead
from tests.learning.conftest import LENGTH, make_world, packed, plain_rows, small_lm


def actions(batch, b, t):
    """Places of a turn's actions in a packed row."""
    return np.flatnonzero(np.asarray(batch.mask[b]) & (np.asarray(batch.turn[b]) == t))


def test_every_action_sees_its_plain_row(world, bpe):
    """Tokens that an action's place may see, in order of position, are the plain row up to that place."""
    batch, rows = jax.device_get(packed(world)), plain_rows(world, bpe)
    assert batch.mask.sum() == sum(len(row.completion) for row in rows)
    mask = np.asarray(visible(AttentionMask(None, batch.branch, batch.branch), LENGTH))
    for row in rows:
        b, positions = row.dialogue, actions(batch, row.dialogue, row.turn)
        assert batch.target[b, positions].tolist() == row.completion
        assert batch.state[b, positions].tolist() == row.states
        np.testing.assert_array_equal(batch.logprob[b, positions], world.turns[b][row.turn].logprob)
        for j, position in enumerate(positions):
            seen = np.flatnonzero(mask[b, position])
            assert batch.tokens[b, seen].tolist() == row.ids[: row.start + j]
            assert batch.positions[b, seen].tolist() == list(range(row.start + j))


def test_rows_hold_the_distinct_tokens_only(world):
    """Counted by hand: each message once, each thought once, the last say only where it was sampled."""
    batch, spec = jax.device_get(packed(world)), world.spec
    think, tables = spec.mode == "think", world.tables
    marks = len(tables.open_user) + len(tables.close) + len(tables.open_assistant)
    for b, dialogue in enumerate(world.turns):
        want = len(tables.system)
        for t, turn in enumerate(dialogue):
            want += marks + len(turn.heard) + (len(tables.close) if t else 0)
            want += len(tables.think_open) + len(turn.completion) - 1 if think else len(turn.say)
            want += len(turn.say) if think and t + 1 < len(dialogue) else 0
        assert batch.count[b] == want
        assert not batch.tokens[b, want:].any()
        assert not batch.mask[b, want:].any()
    np.testing.assert_array_equal(row_lengths(world.dialogues, tables, spec), batch.count)
    assert batch.count.max() <= max_length(tables, spec, 12)


def test_another_length_changes_nothing_else(world):
    longer = packed(world, LENGTH + 70)
    for name, array in vars(packed(world)).items():
        actual = getattr(longer, name)
        np.testing.assert_array_equal(actual if array.ndim == 1 else actual[:, :LENGTH], array)
        assert array.ndim == 1 or not actual[:, LENGTH:].any()


def test_forced_tokens_are_no_actions(bpe, prompts):
    """The closing that the grammar says at a thought's limit was not drawn; what follows was."""
    world = make_world(bpe, prompts, "think", seed=1, batch=3)
    closing = np.asarray(bpe.encode("\n</think>\n\n"), np.int32)
    tables = world.tables.replace(grammar=world.tables.grammar.replace(closing=jnp.asarray(closing)))
    completion = world.dialogues.policy.completion
    limit, cut = 9, 9 - len(closing)
    tokens = np.array(completion.tokens)
    tokens[0, 1, cut:limit] = closing
    count, found_at = np.array(completion.count), np.array(completion.found_at)
    count[0, 1], found_at[0, 1] = limit + 3, limit - 1
    completion = completion.replace(
        tokens=jnp.asarray(tokens), count=jnp.asarray(count), found_at=jnp.asarray(found_at)
    )
    forced = world._replace(
        tables=tables, dialogues=world.dialogues.replace(policy=world.dialogues.policy.replace(completion=completion))
    )
    batch = jax.device_get(packed(forced))
    assert batch.target[1, actions(batch, 1, 0)].tolist() == [*tokens[0, 1, :cut], *tokens[0, 1, limit : limit + 3]]


# Loss and gradients: the packed rows against one plain row a turn, written out with a whole [rows, L, V] array.

OPTIONS = LossConfig(clip_low=0.2, clip_high=0.3, dual_clip=3.0, entropy=0.01, value_clip=0.5)


@functools.cache
def row_numbers(count: int, seed: int = 5):
    """Per action token, in the order dialogue, turn, token: old log-prob's distance, advantage, value, return."""
    draw = np.random.default_rng(seed)
    return [draw.normal(0, s, count).astype(np.float32) for s in (0.3, 1.0, 0.2, 0.5)]


def plain_loss(trained, model, head, rows, forbidden, numbers):
    """PPO as in its paper, on rows of one turn."""
    width = max(len(row.ids) for row in rows)
    ids = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = row.ids
    where = np.concatenate(
        [
            np.stack([np.full(len(r.completion), i), r.start - 1 + np.arange(len(r.completion))], 1)
            for i, r in enumerate(rows)
        ]
    )
    targets = np.concatenate([r.completion for r in rows])
    states = np.concatenate([r.states for r in rows])
    positions = jnp.broadcast_to(jnp.arange(width), ids.shape)

    def hidden(params):
        return model.apply({"params": params}, ids, positions)[0][where[:, 0], where[:, 1]]

    of_policy = hidden(trained["policy"])
    scores = jnp.where(forbidden[states], -jnp.inf, logits(trained["policy"], of_policy))
    log_p = jax.nn.log_softmax(scores)
    allowed = ~forbidden[states]
    safe = jnp.where(allowed, log_p, 0.0)
    entropy = -jnp.where(allowed, jnp.exp(safe) * safe, 0.0).sum(-1)
    new = jnp.take_along_axis(log_p, targets[:, None], 1)[:, 0]
    distance, advantage, old_value, returns = numbers
    ratio = jnp.exp(new - (jax.lax.stop_gradient(new) + distance))
    clipped = jnp.clip(ratio, 1 - OPTIONS.clip_low, 1 + OPTIONS.clip_high)
    objective = jnp.maximum(-advantage * ratio, -advantage * clipped)
    objective = jnp.where(advantage < 0, jnp.minimum(objective, -advantage * OPTIONS.dual_clip), objective)
    value = hidden(trained["critic"]["trunk"]) @ trained["critic"]["head"]["kernel"] + trained["critic"]["head"]["bias"]
    near = jnp.clip(value, old_value - OPTIONS.value_clip, old_value + OPTIONS.value_clip)
    critic = 0.5 * jnp.maximum((value - returns) ** 2, (near - returns) ** 2)
    return objective.mean() - OPTIONS.entropy * entropy.mean() + critic.mean(), new


@pytest.mark.parametrize(
    ("world", "scan"),
    [
        ("think", True),
        ("direct", False),
        *(pytest.param(*both, marks=pytest.mark.slow) for both in (("think", False), ("direct", True))),
    ],
    indirect=["world"],
)
def test_packed_training_is_one_row_per_turn(world, bpe, scan):
    batch, rows = packed(world), plain_rows(world, bpe)
    lm, critic = small_lm(bpe, scan_layers=scan), small_lm(bpe, seed=4, scan_layers=scan)
    kernel = 0.1 * np.random.default_rng(0).standard_normal(32).astype(np.float32)
    trained = {
        "policy": lm.params,
        "critic": {"trunk": critic.params, "head": {"kernel": jnp.asarray(kernel), "bias": jnp.float32(0.2)}},
    }
    numbers = row_numbers(sum(len(row.completion) for row in rows))
    plain = functools.partial(plain_loss, model=lm.model, head=None, rows=rows)
    (want, new), want_gradient = jax.jit(jax.value_and_grad(
        lambda t: plain(t, forbidden=world.tables.grammar.forbidden, numbers=numbers), has_aux=True
    ))(trained)  # fmt: skip

    order = np.concatenate([row.dialogue * LENGTH + actions(batch, row.dialogue, row.turn) for row in rows])

    def spread(values):
        flat = np.full(batch.mask.size, np.nan, np.float32)  # garbage where no action is
        flat[order] = values
        return jnp.asarray(flat.reshape(batch.mask.shape))

    distance, advantage, old_value, returns = numbers
    weight = loss_terms.token_weights(batch.mask, "token_mean")
    sample = LossInputs(
        batch, spread(np.asarray(new) + distance), spread(advantage), weight, weight,
        value=spread(old_value), returns=spread(returns),
    )  # fmt: skip
    learner = TrainedModels(lm.model, critic.model, ValueHead(), OPTIONS, vocab_chunk=100)
    (actual, metrics), gradient = jax.jit(jax.value_and_grad(
        lambda t: loss(learner, t, sample, world.tables.grammar), has_aux=True
    ))(trained)  # fmt: skip
    np.testing.assert_allclose(actual, want, rtol=1e-6)
    assert optax.global_norm(want_gradient) > 0.1
    for (path, mine), theirs in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(want_gradient), strict=True
    ):
        scale = float(jnp.abs(theirs).max()) + 1e-12
        np.testing.assert_allclose(mine / scale, theirs / scale, atol=1e-5, err_msg=jax.tree_util.keystr(path))
    np.testing.assert_allclose(metrics["max"]["policy/ratio_max"], np.exp(np.abs(distance).max()), rtol=1e-4)


def test_a_batch_without_any_action_has_no_loss(bpe, prompts):
    """A dialogue may end before its first turn; a batch of such dialogues still trains, on nothing."""
    world = make_world(bpe, prompts, "think")
    empty = world._replace(dialogues=world.dialogues.replace(turns=jnp.zeros_like(world.dialogues.turns)))
    batch, lm = packed(empty), small_lm(bpe)
    weight = loss_terms.token_weights(batch.mask, "token_mean")
    sample = LossInputs(batch, batch.logprob, jnp.full(weight.shape, jnp.nan), weight, weight)
    learner = TrainedModels(lm.model, None, None, OPTIONS)
    value, gradient = jax.jit(
        jax.value_and_grad(lambda p: loss(learner, {"policy": p}, sample, world.tables.grammar)[0])
    )(lm.params)
    assert value == 0
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient))


def test_training_reads_no_whole_vocabulary(world, bpe):
    """No [B, L, V] array in the loss and its gradient."""
    batch, lm = packed(world), small_lm(bpe)
    weight = loss_terms.token_weights(batch.mask, "token_mean")
    sample = LossInputs(batch, batch.logprob, weight, weight, weight)
    learner = TrainedModels(lm.model, None, None, OPTIONS, vocab_chunk=64)
    text = (
        jax.jit(jax.grad(lambda p: loss(learner, {"policy": p}, sample, world.tables.grammar)[0]))
        .lower(lm.params)
        .compile()
        .as_text()
    )
    rows = lm.model.config.vocab_size
    assert f",{LENGTH},{rows}]" not in text
    assert f"[{batch.mask.size},{rows}]" not in text
    hidden = forward(lm.model, lm.params, batch)
    assert action_logprobs(learner, lm.params, hidden, batch, world.tables.grammar).logprob.shape == batch.mask.shape
