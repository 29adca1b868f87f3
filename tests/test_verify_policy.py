"""Every token of a policy is recomputed; whatever else is in a log is found.

Held against plain forward passes: for each turn a fresh prompt of plain messages, one pass without a cache, log-softmax
and the sampler's rules in NumPy float64.
"""

import copy
import dataclasses
import io
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from scipy.special import log_softmax, logsumexp

from rlver_jax import evaluate, verify
from rlver_jax.config.flags import config_from_flags
from rlver_jax.decoding.generate import KEEP_ALL, Truncation
from rlver_jax.decoding.replay import Keys, ReplayInput, Sampler, replay
from rlver_jax.dialogues.log import dialogue_records, read_dialogues, rewards_of, write_dialogues
from rlver_jax.dialogues.verify_policy import LoggedReplies, Policy, _replies, verify_replies
from rlver_jax.dialogues.verify_tokens import TOLERANCES
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.rollout.agents import Agents
from rlver_jax.rollout.policy_replay_sequence import PolicyPacker
from rlver_jax.rollout.spec import RolloutConfig, RolloutLimits
from rlver_jax.text.chat import ChatTemplate
from rlver_jax.training.loop import train
from rlver_jax.user.emotion import EmotionRules
from rlver_jax.user.turn import UserLimits, dialogue_key
from tests.conftest import SHORT_PROMPTS, make_profiles, plain

TURNS, COUNT, SEED = 3, 6, 9
THINK, SAY = 20, 10  # short: both are cut by limits, too
# name: (mode, enforce_format, temperature, truncation)
WAYS = {
    "think": ("think", False, 1.0, KEEP_ALL),
    "enforced": ("think", True, 1.0, KEEP_ALL),
    "direct": ("direct", False, 1.0, KEEP_ALL),
    "cold": ("direct", False, 0.5, KEEP_ALL),
    "greedy": ("think", False, 0.0, KEEP_ALL),
    "truncated": ("think", False, 1.4, Truncation(20, 0.8)),
    "top_k": ("direct", False, 0.7, Truncation(5)),
}
SLOW = {"top_k", "truncated", "enforced"}  # each takes a play program of its own, and the others hold most of it


@dataclasses.dataclass(frozen=True)
class Log:
    """Honest dialogues, and who played them."""

    agents: Agents
    temperature: float
    records: list

    def policy(self, dtype="float32", **changed) -> Policy:
        p = self.agents
        return Policy(changed.get("lm", p.policy), p.tokenizer, p.tables[0], p.spec, TOLERANCES[dtype])

    def results(self, records=None, temperature=None, **changed):
        temperature = self.temperature if temperature is None else temperature
        logged = [LoggedReplies(record, temperature) for record in (self.records if records is None else records)]
        return list(verify_replies(self.policy(**changed), logged))

    def faults(self, *records, **changed) -> list[str]:
        return [fault for one in self.results(records or None, **changed) for fault in one.faults]


def play(way, policy_lm, user_lm, bpe, prompts, seed=SEED) -> Log:
    mode, enforce, temperature, truncation = WAYS[way]
    spec = RolloutConfig(
        mode, enforce, group=1, max_turns=TURNS, context=700, think_tokens=THINK, say_tokens=SAY, user_tokens=12,
        rules=EmotionRules(initial=40, floor=-1), truncation=truncation,
    )  # fmt: skip
    agents = Agents.build(policy_lm, user_lm, bpe, prompts, spec, style="vanilla", scenario="heart_to_heart")
    user = UserLimits(jnp.int32(8), jnp.int32(12), jnp.float32(1.0))
    limits = RolloutLimits(
        jnp.int32(TURNS), jnp.int32(THINK), jnp.int32(SAY), jnp.float32(temperature), jnp.int32(40), user
    )
    profiles = make_profiles(COUNT)
    played = jax.device_get(agents.play(agents.encode(profiles, range(COUNT)), jax.random.key(seed), limits))
    rewards = rewards_of(played, {"name": "final", "gamma": 1.0, "weight": 0.5})
    records = dialogue_records(played, agents, profiles, range(COUNT), seed=seed, rewards=rewards)
    return Log(agents, temperature, records)


@pytest.fixture(scope="module", params=[pytest.param(way, marks=[pytest.mark.slow][: way in SLOW]) for way in WAYS])
def log(request, policy_lm, user_lm, bpe, prompts) -> Log:
    return play(request.param, policy_lm, user_lm, bpe, prompts)


@pytest.fixture(scope="module")
def thinking(policy_lm, user_lm, bpe, prompts) -> Log:
    return play("think", policy_lm, user_lm, bpe, prompts)


def replies(record) -> list[dict]:
    return record["messages"][1::2]


def test_an_honest_log_is_recomputed_completely(log):
    results = log.results()
    assert [one.faults for one in results] == [[]] * COUNT
    assert sum(one.tokens for one in results) == sum(len(m["tokens"]) for r in log.records for m in replies(r)) > 60
    assert 0 < max(one.logprob_error for one in results) < 1e-4


def test_replies_of_all_kinds_are_among_them(thinking, policy_lm, user_lm, bpe, prompts):
    """Kept to the format and not, ended by a stop token and cut at a limit."""
    assert {m["violation"] for record in thinking.records for m in replies(record)} == {True, False}
    direct = play("direct", policy_lm, user_lm, bpe, prompts)
    assert {m["stopped"] for record in direct.records for m in replies(record)} == {True, False}


def fresh(log, record) -> list[tuple[list[int], dict]]:
    """(the prompt of plain messages before each reply, the reply)."""
    spec, tokenizer = log.agents.spec, log.agents.tokenizer
    chat, contexts = ChatTemplate(tokenizer), []
    ids = chat.message("system", SHORT_PROMPTS[f"policy_{spec.mode}.j2"])
    for heard, reply in zip(record["messages"][::2], replies(record), strict=False):
        ids = ids + chat.open("user") + heard["tokens"] + chat.close + chat.open("assistant")
        contexts.append((ids + (tokenizer.encode("<think>\n") if spec.mode == "think" else []), reply))
        ids = ids + reply["say_tokens"] + chat.close
    return contexts


def noise_of(record, turn, step, size):
    key = jax.random.key(record["seed"])
    for number in (0, record["dialogue"], turn, 0, step):
        key = jax.random.fold_in(key, number)
    return np.asarray(jax.random.gumbel(key, (size,)), np.float64)


def truncated(log_p, truncation):
    """top-k, then top-p of what is left, by sorting."""
    truncated_logp = log_p.copy()
    if truncation.top_k:
        truncated_logp[np.argsort(-truncated_logp)[truncation.top_k :]] = -np.inf
    if truncation.top_p < 1:
        p = np.exp(log_softmax(truncated_logp))
        order = np.argsort(-p)
        before = np.cumsum(p[order]) - p[order]
        truncated_logp[order[before >= truncation.top_p]] = -np.inf
    return truncated_logp


def expected(log, record):
    """(margin, raw, sampled) of every token of a dialogue, by plain passes; margin 0 of what the sampler put there."""
    spec, tokenizer = log.agents.spec, log.agents.tokenizer
    prompts, size = fresh(log, record), log.agents.policy.model.config.vocab_size
    logp = plain(log.agents.policy, [prompt + reply["tokens"] for prompt, reply in prompts])[1]
    never = [i for i in range(size) if i >= tokenizer.vocab_size or not tokenizer.token_bytes(i)]
    stops = [tokenizer.im_end_id, tokenizer.pad_id]
    closing = tokenizer.encode("\n</think>\n\n")
    for turn, ((prompt, reply), rows) in enumerate(zip(prompts, logp, strict=True)):
        for step, token in enumerate(reply["tokens"]):
            raw = rows[len(prompt) - 1 + step].astype(np.float64)
            text = b"".join(tokenizer.token_bytes(t) for t in reply["tokens"][:step])
            thinks = spec.mode == "think" and b"</think>" not in text
            ruled_out = set(never) - set(stops)
            if thinks:  # no token that ends the tag and says something
                ruled_out |= {t for t in range(tokenizer.vocab_size) if _merges(text, tokenizer.token_bytes(t))}
            visible = text.partition(b"</think>")[2].strip()
            if spec.enforce_format and not visible:
                ruled_out |= set(stops)
            if spec.enforce_format and thinks and step >= THINK - len(closing):
                assert token == closing[step - THINK + len(closing)]
                yield 0.0, raw[token], 0.0
                continue
            allowed = raw.copy()
            allowed[list(ruled_out)] = -np.inf
            if not log.temperature:
                yield allowed.max() - allowed[token], raw[token], 0.0
                continue
            allowed_logp = truncated(allowed / log.temperature, spec.truncation)
            scores = allowed_logp + noise_of(record, turn, step, size)
            margin = (scores.max() - scores[token]) * min(log.temperature, 1)
            yield margin, raw[token], allowed_logp[token] - logsumexp(allowed_logp)


def _merges(before: bytes, piece: bytes) -> bool:
    text = before[-7:] + piece
    at = text.find(b"</think>")
    return at >= 0 and bool(text[at + 8 :].strip())


def recompute(log, record):
    """What `replay` gives for a dialogue."""
    policy, spec = log.policy(), log.agents.spec
    packer = PolicyPacker(policy.tables, think_tokens=spec.think_tokens)
    key = dialogue_key(jax.random.key(record["seed"]), np.uint32(record["dialogue"]))
    sequence = packer.dialogue(list(_replies(policy, record)))
    sampler = Sampler(policy.lm, policy.tables.grammar, truncation=spec.truncation)
    (result,) = replay(sampler, [ReplayInput(sequence, Keys(key, key), log.temperature)], 1e-4)
    return result


def test_every_figure_is_that_of_plain_forward_passes(log):
    """Of honest replies, and of forged ones, whose margins and log-probs are none that a sampler has written."""
    record = max(log.records, key=lambda r: sum(len(m["tokens"]) for m in replies(r)))
    forged = copy.deepcopy(record)
    for message in replies(forged):  # words of another kind, but none that ends something
        position = len(message["tokens"]) - message["stopped"] - 1
        swap = next(t for t in (80, 81) if t != message["tokens"][position])
        if not log.agents.spec.enforce_format:
            message["tokens"][position] = swap
            if message["say_tokens"]:
                message["say_tokens"][-1] = swap
    for one, honest in ((record, True), (forged, log.agents.spec.enforce_format)):
        actual = recompute(log, one)
        margin, raw, sampled = np.array(list(expected(log, one))).T
        np.testing.assert_allclose(actual.logprob, raw, atol=1e-4)
        finite = np.isfinite(margin)
        np.testing.assert_allclose(actual.margin[finite], margin[finite], atol=1e-4)
        np.testing.assert_array_equal(actual.margin[~finite], np.inf)
        for bound in actual.sampled.T:
            np.testing.assert_allclose(bound[finite], sampled[finite], atol=1e-4)
        assert honest == (margin.max() < 1e-4)


def refit(log, record):
    """A forged dialogue with the log-probabilities that the policy really gives its words."""
    values = iter(list(expected(log, record)))
    for message in replies(record):
        of_message = [next(values) for _ in message["tokens"]]
        message["raw_logprobs"] = [raw for _, raw, _ in of_message]
        message["logprobs"] = [sampled for _, _, sampled in of_message]
    return record


def test_the_second_best_word_is_found(thinking):
    """The log's own log-probabilities refitted: nothing but the key tells them apart."""
    record = copy.deepcopy(thinking.records[0])
    message = replies(record)[-1]
    position = len(message["tokens"]) - message["stopped"] - 1
    prompt, _ = fresh(thinking, record)[-1]
    (rows,) = plain(thinking.agents.policy, [prompt + message["tokens"]])[1]
    scores = rows[len(prompt) - 1 + position] + noise_of(record, len(replies(record)) - 1, position, rows.shape[1])
    scores[[t for t in range(len(scores)) if t >= 300 or not thinking.agents.tokenizer.token_bytes(t)]] = -np.inf
    scores[message["tokens"][position]] = -np.inf
    message["tokens"][position] = int(scores.argmax())
    faults = thinking.faults(refit(thinking, record))
    turn = len(replies(record))
    assert faults
    assert faults[0].startswith(
        f"turn {turn}, 'reply of the policy', token {position + 1}: not the policy's own choice"
    )
    assert not any("log-probability" in fault for fault in faults)


@pytest.mark.parametrize("name", ["logprobs", "raw_logprobs"])
@pytest.mark.parametrize("error", [0.01, -0.01, float("nan"), float("inf"), float("-inf")])
def test_moved_log_probabilities_are_found(log, name, error):
    record = copy.deepcopy(log.records[1])
    replies(record)[0][name][1] += error
    assert len(log.faults(record)) == 1
    assert log.faults(record)[0].startswith("turn 1, 'reply of the policy', token 2: logged log-probability")


def test_rounding_of_bfloat16_is_allowed_and_no_more(log):
    record = copy.deepcopy(log.records[1])
    replies(record)[0]["raw_logprobs"][1] -= 0.9
    assert log.faults(record, dtype="bfloat16") == []
    replies(record)[0]["raw_logprobs"][1] -= 0.9
    assert len(log.faults(record, dtype="bfloat16")) == 1


def test_the_best_of_other_seeds_is_found(thinking, policy_lm, user_lm, bpe, prompts):
    others = [play("think", policy_lm, user_lm, bpe, prompts, seed).records[2] for seed in range(40, 44)]
    best = max(others, key=lambda record: record["emotion"])
    forged = best | {"seed": SEED}
    assert thinking.faults(best) == []
    assert any("not the policy's own choice" in fault for fault in thinking.faults(forged))
    number = thinking.records[2] | {"dialogue": 1}
    assert any("not the policy's own choice" in fault for fault in thinking.faults(number))


def test_thoughts_of_another_model_and_swapped_replies_are_found(thinking, user_lm, policy_lm, bpe, prompts):
    other = policy_lm.replace(params=jax.tree.map(lambda x: 0.9 * x, policy_lm.params))
    theirs = play("think", other, user_lm, bpe, prompts)
    mine = next(r for r in thinking.records if len(replies(r)) > 1)

    def split(message):
        at = next((i for i, t in enumerate(message["tokens"]) if b">" in bpe.token_bytes(t)), None)
        return None if at is None else at + 1

    source = next(
        m for r in theirs.records for m in replies(r) if split(m) and m["tokens"] != replies(mine)[0]["tokens"]
    )
    forged = copy.deepcopy(mine)
    first = replies(forged)[0]
    first["tokens"] = source["tokens"][: split(source)] + first["tokens"][split(first) or 0 :]
    assert any("not the policy's own choice" in fault for fault in thinking.faults(refit(thinking, forged)))
    swapped = copy.deepcopy(mine)
    one, two = replies(swapped)[:2]
    one["tokens"], two["tokens"] = two["tokens"], one["tokens"]
    one["say_tokens"], two["say_tokens"] = two["say_tokens"], one["say_tokens"]
    one["stopped"], two["stopped"] = two["stopped"], one["stopped"]
    assert any("not the policy's own choice" in fault for fault in thinking.faults(refit(thinking, swapped)))


def test_another_temperature_or_model_is_found(log, policy_lm):
    assert log.faults(temperature=log.temperature + 0.3)
    other = policy_lm.replace(params=jax.tree.map(lambda x: 0.99 * x, policy_lm.params))
    assert log.faults(lm=other)


def test_a_user_behind_an_endpoint_is_heard_as_text(log):
    """Its log has no tokens of the user: the policy read those of the text."""
    bpe, records = log.agents.tokenizer, copy.deepcopy(log.records)
    same = [
        r for r in records if all(bpe.encode(m["content"]) == m["tokens"] for m in r["messages"][::2] if m["tokens"])
    ]
    for record in same:
        for message in record["messages"][::2]:
            message["tokens"] = None
    assert same
    assert log.faults(*same) == []


CONFIG = """
from configs import debug

def get_config(arg=""):
    c = debug.get_config(arg)
    c.train.steps, c.train.seed = 3, 3
    c.checkpoint.every, c.checkpoint.keep_last, c.checkpoint.keep_best = 1, 2, 0
    c.log.dialogues_every, c.log.tensorboard, c.eval.every = 1, False, 0
    c.mesh.fsdp = c.mesh.tensor = 1
    return c
"""  # with fields of the config as tests of the training loop have them, the same programs are compiled


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(a run of three steps that keeps the last two checkpoints, its config's flag)."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "config.py").write_text(CONFIG)
    config, _, _ = config_from_flags([f"--config={folder / 'config.py'}"], None)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    assert train(config, folder / "run", mesh, Console(file=io.StringIO())) == 3
    return folder / "run", f"--config={folder / 'config.py'}"


def run_verify(capsys, *argv) -> tuple[int, str]:
    capsys.readouterr()
    status = verify.main(list(map(str, argv)))
    output = capsys.readouterr()
    return status, output.out + output.err


@pytest.mark.slow
def test_training_logs_are_held_against_the_policy_before_their_step(trained, capsys):
    run, config = trained
    logs = [run / "dialogues" / f"step_00000{step}.jsonl" for step in (1, 2, 3)]
    status, output = run_verify(capsys, logs[0], logs[2], config, f"--policy={run}")
    assert status == 0, output
    assert "recomputed 16 dialogues" in output
    assert " 0 faults" in output
    assert "--policy" not in output, "nothing of the policy is left out"
    tokens = sum(
        len(m["tokens"]) for log in (logs[0], logs[2]) for r in read_dialogues(log) for m in r["messages"][1::2]
    )
    users = run_verify(capsys, logs[0], logs[2], config)[1]
    assert "not recomputed: the policy's words and log-probs (--policy=…)" in users
    count = lambda text: int(re.search(r"(\d+) tokens", text)[1])  # noqa: E731
    assert count(output) - count(users) == tokens
    status, output = run_verify(capsys, logs[1], config, f"--policy={run}")
    assert (status, "there are steps 2, 3" in output, "step 1, of which no checkpoint" in output) == (2, True, True)
    status, output = run_verify(capsys, logs[0], config, f"--policy={run}", "--step=3")
    assert status == 1, "a policy that has learned is another one"
    assert "the policy's own choice" in output or "log-probability" in output


@pytest.mark.slow
def test_a_forged_number_is_a_fault_and_the_others_are_recomputed(trained, tmp_path, capsys):
    """It would be of a step whose policy there never was."""
    run, config = trained
    records = read_dialogues(run / "dialogues" / "step_000003.jsonl")
    for number, step in ((900, 113), (-1, 0)):
        records[3]["dialogue"] = number
        write_dialogues(tmp_path / "log.jsonl", records)
        status, output = run_verify(capsys, tmp_path / "log.jsonl", config, f"--policy={run}")
        assert status == 1, output
        assert f"dialogue {number}" in output
        assert "dialogues 19" in output, "it is missing"
        assert "recomputed 8 dialogues" in output
        if number >= 0:
            assert f"training step {step} were played by the policy as it was after step {step - 1}" in output


@pytest.mark.slow
def test_logs_of_which_nothing_can_be_recomputed(trained, tmp_path, capsys):
    run, config = trained
    records = read_dialogues(run / "dialogues" / "step_000003.jsonl")
    for record in records:
        record["seed"] = None
    write_dialogues(tmp_path / "log.jsonl", records)
    status, output = run_verify(capsys, tmp_path / "log.jsonl", config, f"--policy={run}")
    assert status == 1, output
    assert "dialogue 16, seed is null" in output


@pytest.mark.slow
def test_a_dialogue_of_another_step_and_lines_that_are_none_are_faults(trained, tmp_path, capsys):
    """Not bad usage: the others are recomputed."""
    run, config = trained
    records = read_dialogues(run / "dialogues" / "step_000003.jsonl")
    for name, change in (("step", {"dialogue": 80_000}), ("number", {"dialogue": -1}), ("none", {"messages": 1})):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(r) + "\n" for r in [records[0] | change, *records[1:]]))
        status, output = run_verify(capsys, file, config, f"--policy={run}")
        assert status == 1, output
        assert "fault: " in output
    file.write_text(json.dumps(records[0] | {"emotion": "x"}) + "\n")
    assert run_verify(capsys, file, config, f"--policy={run}")[0] == 1


@pytest.mark.slow
def test_an_evaluation_is_held_against_the_checkpoint_that_played_it(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    run, config = trained
    few = "--config.eval.num_profiles=2"
    assert evaluate.main([config, few, f"--checkpoint={run}", "--step=2", f"--out={tmp_path}"]) == 0
    log = tmp_path / "dialogues.jsonl"
    for flags, expected in (([f"--policy={run}", "--step=2"], 0), ([f"--policy={run}"], 1), ([], 0)):
        assert run_verify(capsys, log, config, few, *flags)[0] == expected, flags


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "output"),
    [
        (["--step=2"], "add --policy=WORKDIR"),
        (["--policy=/no/such"], "/no/such"),
        (["--policy=RUN", "--step=7"], "there are steps 2, 3"),
        (["--policy=gs://bucket/run"], "gs://bucket"),
    ],
)
def test_what_cannot_be_the_policy_is_refused(trained, flags, output, capsys):
    run, config = trained
    flags = [flag.replace("RUN", str(run)) for flag in flags]
    status, printed = run_verify(capsys, run / "dialogues" / "step_000003.jsonl", config, *flags)
    assert (status, output in printed) == (2, True), printed


def test_what_reads_checkpoints_is_imported_where_a_policy_is_named():
    """Orbax and what it needs would add to every start of `verify`."""
    ask = "import sys, rlver_jax.verify; sys.exit('orbax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", ask], check=False).returncode == 0
