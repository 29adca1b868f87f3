"""The loss of supervised fine-tuning against NumPy in float64 and plain rows; shared rows; other meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlver_jax.decoding.choice import build_options
from rlver_jax.learning import sft_loss
from rlver_jax.learning.optimizer import Optimizers, make_optimizer
from rlver_jax.learning.packing import assign_rows
from rlver_jax.learning.sft_loss import FieldLoss
from rlver_jax.learning.sft_rows import Capacity, pack_rows
from rlver_jax.models.qwen import abstract_params
from rlver_jax.parallel import rules
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.rollout.agents import Agents
from rlver_jax.rollout.spec import RolloutConfig
from rlver_jax.training.setup import first_state, state_shardings
from rlver_jax.training.sft_examples import PolicyExamples, UserExamples, change_pairs, soft_targets
from rlver_jax.user.emotion import CHANGES
from rlver_jax.user.turn import option_text
from tests.learning.conftest import small_lm
from tests.learning.plain_sft import field_sums, policy_lines, transcripts, user_lines

SPEC = RolloutConfig("think", False, 1, 8, context=600, think_tokens=40, say_tokens=40, user_tokens=40)
LENGTH = 448  # of rows: the longest dialogue has 426 tokens
WEIGHTS = {"content": 0.5, "feeling": 1.0, "change": 3.0, "tone": 1.0, "reply": 2.0, "thought": 0.25}


@pytest.fixture(scope="module")
def lm(bpe):
    return small_lm(bpe, scan_layers=False)


@pytest.fixture(scope="module")
def agents(lm, bpe, prompts):
    return Agents.build(lm, lm, bpe, prompts, SPEC, style="vanilla", scenario="heart_to_heart")


def made(agents, role, soft=0):
    """(maker, examples, plain lines)."""
    dialogues, tokenizer = transcripts(), agents.tokenizer
    if role == "user":
        make = UserExamples(agents, field_tokens=40, reply_tokens=40, soft=soft)
        lines = [line for one in dialogues for line in user_lines(tokenizer, one, soft)]
    else:
        make = PolicyExamples(agents, min_change=-10, say_tokens=40)
        lines = [line for one in dialogues for line in policy_lines(tokenizer, one)]
    examples = [make.example(one) for one in dialogues]
    assert make.left_out == {}
    return make, examples, lines


def rows_of(examples, length, width=1):
    """Reads of rows, and of their changes."""
    assignment = assign_rows(np.array([len(one) for one in examples]), length, width)
    return pack_rows(examples, assignment, length, width, Capacity.of(examples))


def loss_and_gradient(of, params, rows, weights):
    """(S_f, gradient) of all reads, as the loop adds them up."""
    add = jax.jit(functools.partial(sft_loss.add_gradient, of))
    total, sums = sft_loss.zero_gradient(of, params), 0.0
    for i in range(rows.tokens.shape[0]):
        total, part = add(params, total, jax.tree.map(lambda x, i=i: x[i], rows), weights)
        sums = sums + part
    return np.asarray(sums), total


def field_weights_of(make, lines, wanted=WEIGHTS):
    """w_f / sum_f w_f N_f, with N_f counted in the plain lines."""
    count = {name: sum(line.share * len(line.tokens) for line in lines if line.field == name) for name in make.fields}
    total = sum(wanted[name] * count[name] for name in make.fields)
    return np.array([wanted[name] / total for name in make.fields])


@pytest.mark.parametrize(
    ("role", "soft"), [*(pytest.param("user", soft, marks=pytest.mark.slow) for soft in (0, 3)), ("policy", 0)]
)
def test_loss_and_gradient_are_those_of_float64(agents, lm, role, soft):
    make, examples, lines = made(agents, role, soft)
    of, weights = FieldLoss(lm.model, len(make.fields), vocab_chunk=100), field_weights_of(make, lines)
    rows, _ = rows_of(examples, LENGTH)
    assert rows.tokens.shape[0] < len(examples), "some share a row"
    sums, gradient = loss_and_gradient(of, lm.params, rows, jnp.float32(weights))
    params64 = jax.tree.map(lambda x: np.asarray(x, np.float64), lm.params)
    wanted = field_sums(params64, lm.model.config, lines)
    assert wanted.keys() == set(make.fields)
    for name, actual in zip(make.fields, sums, strict=True):
        assert actual == pytest.approx(wanted[name], rel=1e-5), name

    def loss(params):
        sums_of_fields = field_sums(params, lm.model.config, lines)
        return sum(weight * sums_of_fields[name] for name, weight in zip(make.fields, weights, strict=True))

    # Directions in which all parameters move: each shows the gradient's length along it.
    for seed in range(2):
        draw = np.random.default_rng(seed)
        way = jax.tree.map(lambda x: draw.standard_normal(x.shape), params64)  # noqa: B023
        if seed == 1:
            way = jax.tree.map(lambda x: np.asarray(x, np.float64), gradient)
        norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(way)))
        way = jax.tree.map(lambda x: x / norm, way)  # noqa: B023
        ahead, behind = (loss(jax.tree.map(lambda x, v: x + s * v, params64, way)) for s in (1e-5, -1e-5))  # noqa: B023
        slope = (ahead - behind) / 2e-5
        ours = sum(jax.tree.leaves(jax.tree.map(lambda g, v: (np.asarray(g, np.float64) * v).sum(), gradient, way)))
        assert ours == pytest.approx(slope, abs=1e-5, rel=1e-5), seed
        assert seed < 1 or slope > 0.1, "the gradient's own direction climbs"


@pytest.mark.parametrize("role", [pytest.param("user", marks=pytest.mark.slow), "policy"])
def test_shared_rows_are_one_row_per_example(agents, lm, role):
    make, examples, lines = made(agents, role, 2)
    of, weights = FieldLoss(lm.model, len(make.fields)), jnp.float32(field_weights_of(make, lines))
    alone = [rows_of([one], LENGTH)[0] for one in examples]
    sums, gradient = 0.0, None
    for rows in alone:
        part, more = loss_and_gradient(of, lm.params, rows, weights)
        sums, gradient = sums + part, more if gradient is None else jax.tree.map(jnp.add, gradient, more)
    for length, width in ((1152, 1), (LENGTH, 2)):
        shared, _ = rows_of(examples, length, width)
        assert shared.tokens.shape[0] * width < len(examples) or width > 1
        actual, ours = loss_and_gradient(of, lm.params, shared, weights)
        np.testing.assert_allclose(actual, sums, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, gradient)


def test_no_row_has_more_targets_than_there_is_room_for(agents):
    _, examples, _ = made(agents, "user", 20)
    assert max(len(one.at) / len(one) for one in examples) > 0.3
    for length in (LENGTH, 500, 1152):
        rows, choices = rows_of(examples, length)
        assert int((rows.share > 0).sum()) == sum(len(one.at) for one in examples)
        assert int((choices.first > 0).sum()) == sum(len(one.choices) for one in examples)
        assert rows.at.shape[-1] < length


def test_soft_targets_by_hand():
    at = lambda change, width: dict(zip(CHANGES, soft_targets(change, width), strict=True))  # noqa: E731
    assert {c: x for c, x in at(3, 0).items() if x} == {3: 1.0}
    shares = {c: x for c, x in at(-4, 2).items() if x}
    assert shares == pytest.approx({-6: 1 / 9, -5: 2 / 9, -4: 3 / 9, -3: 2 / 9, -2: 1 / 9})
    shares = {c: x for c, x in at(10, 1).items() if x}
    assert shares == pytest.approx({9: 1 / 3, 10: 2 / 3}), "no option lies beyond"


@pytest.mark.parametrize("width", [0, 4, 20])
def test_the_cross_entropy_over_options_is_that_over_their_tokens(tokenizer, width):
    """Any probabilities of next tokens: sum_o q_o log p(o), each option spelt out, is the sum over the pairs."""
    spelt = [tokenizer.encode(option_text(change)) for change in CHANGES]
    options, draw = build_options(spelt), np.random.default_rng(1)
    beginnings = sorted({tuple(tokens[:j]) for tokens in spelt for j in range(len(tokens))})
    logp = {(b, t[len(b)]): draw.normal() for b in beginnings for t in spelt if tuple(t[: len(b)]) == b}
    shares = soft_targets(-9, width)
    wanted = sum(
        share * sum(logp[tuple(tokens[:j]), tokens[j]] for j in range(len(tokens)))
        for share, tokens in zip(shares, spelt, strict=True)
    )
    pairs = [np.asarray(x).tolist() for x in (options.pair_option, options.pair_context)]
    known, step = {}, dict.fromkeys(range(len(spelt)), 0)
    for option, context in zip(*pairs, strict=True):  # of each option its tokens in their order
        known[int(options.contexts[context])] = tuple(spelt[option][: step[option]])
        step[option] += 1
    assert step == {option: len(tokens) for option, tokens in enumerate(spelt)}
    actual = sum(share * logp[known[at], token] for at, token, share in change_pairs(options, shares))
    assert actual == pytest.approx(wanted, rel=1e-9)
    assert len(change_pairs(options, shares)) == len({pair[:2] for pair in change_pairs(options, shares)})


def test_options_are_scored_as_their_tokens(agents, lm):
    """`measure`'s log-probabilities of the logged options are minus the loss of the change."""
    make, examples, _ = made(agents, "user")
    of = FieldLoss(lm.model, len(make.fields))
    rows, choices = rows_of(examples, LENGTH)
    measure = jax.jit(functools.partial(sft_loss.measure, of))
    sums, logprobs, real = 0.0, [], choices.first > 0
    for i, first in enumerate(choices.first):
        part, option_logprobs = measure(lm.params, jax.tree.map(lambda x, i=i: x[i], rows), make.options, first)
        sums, logprobs = sums + np.asarray(part), [*logprobs, option_logprobs]
    chosen = np.take_along_axis(np.stack(logprobs), choices.change[..., None] + 10, axis=-1)[..., 0]
    change = make.fields.index("change")
    assert -chosen[real].sum() == pytest.approx(sums[change], rel=1e-5)
    assert real.sum() == sum(len(one.record["messages"][2::2]) for one in transcripts())


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1)], ids=["replica2_fsdp2_tensor2", "fsdp8"])
@pytest.mark.slow
def test_a_mesh_computes_what_one_device_does(agents, lm, shape):
    """Gradient, norm and the parameters after one step, on eight devices and on one."""
    make, examples, lines = made(agents, "user", 1)
    weights = jnp.float32(field_weights_of(make, lines))
    step = Optimizers(optax.sgd(0.1))

    def after(mesh, width):
        of = FieldLoss(lm.model, len(make.fields), 100, mesh.shape["tensor"])
        shapes, axes = abstract_params(lm.model)
        params = jax.device_put(lm.params, rules.tree_shardings(axes, shapes, mesh))
        state = first_state({"policy": params}, step, mesh)
        shardings = state_shardings(state.params, step, mesh)
        rows, _ = rows_of(examples, LENGTH, width)
        with jax.set_mesh(mesh):
            sums, gradient = loss_and_gradient(of, params, rows, weights)
            update = jax.jit(functools.partial(sft_loss.update, step), out_shardings=(shardings, None))
            new, metrics = update(state, gradient)
        return jax.device_get((sums, gradient, new.params["policy"], metrics["policy/grad_norm"]))

    one = after(make_mesh(1, 1, 1, jax.devices()[:1]), 1)
    many = after(make_mesh(*shape), shape[0] * shape[1])
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_a_gradient_that_is_no_number_moves_nothing_and_is_counted(lm):
    step = Optimizers(optax.sgd(0.1))
    state = first_state({"policy": lm.params}, step, make_mesh(1, 1, 1, jax.devices()[:1]))
    gradient = jax.tree.map(jnp.zeros_like, lm.params)
    gradient["norm"]["scale"] = gradient["norm"]["scale"].at[0].set(jnp.nan)
    new, metrics = sft_loss.update(step, state, gradient)
    jax.tree.map(np.testing.assert_array_equal, new.params["policy"], lm.params)
    assert (int(new.step), float(metrics["train/skipped_updates"])) == (1, 1.0)
    assert np.isnan(metrics["policy/grad_norm"])


def test_the_rate_rises_and_falls():
    """By AdamW's first-order behaviour: with a constant gradient an update is minus the rate."""
    settings = {"grad_clip": 0.0, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "moment_dtype": "float32"}
    adam = make_optimizer(learning_rate=1.0, warmup_steps=4, decay_steps=10, **settings)
    params, gradient = {"x": jnp.zeros(1)}, {"x": jnp.full(1, 2.0)}
    state, rates = adam.init(params), []
    for _ in range(18):
        update, state = adam.update(gradient, state, params)
        rates.append(-float(update["x"][0]))
    expected = [0.2, 0.4, 0.6, 0.8]
    expected += [0.05 + 0.95 * (1 + np.cos(np.pi * min(i, 10) / 10)) / 2 for i in range(14)]
    np.testing.assert_allclose(rates, expected, rtol=1e-4)
