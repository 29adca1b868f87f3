"""Logs that were embellished: each kind of forgery is found, alone and with others, by the command line, in float32.

The honest log that they are made of holds every way to end, openings of both kinds, and two repeats.
"""

import copy
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from rlver_jax import verify
from rlver_jax.config.flags import config_from_flags
from rlver_jax.dialogues.log import write_dialogues
from rlver_jax.evaluation.play import chosen_profiles, eval_spec, of_agents
from rlver_jax.models.hf_weights import save_params
from rlver_jax.rollout.agents import Agents
from tests.test_evaluate import CONFIG

COUNT, REPEATS, TURNS = 6, 2, 4
TALKS = ["my boss did not listen.", None, "I felt awful", "she said goodbye", "my sister", None]


def fields_of(folder, prompts):
    """The config of the base log."""
    return {
        "policy.mode": "think",
        "policy.path": folder / "policy",
        "user.path": folder / "user",
        "user.readout": "sample",
        "user.prompts": Path(prompts.origins["reply.script"]).parent,
        "data.eval": folder / "profiles.jsonl",
        "eval.batch": COUNT * REPEATS,
        "eval.max_turns": TURNS,
        "eval.seed": 58,
        "emotion.floor": 24,
        "emotion.ceiling": 50,
        "rollout.context": 700,
    }


@pytest.fixture(scope="module")
def world(policy_lm, user_lm, bpe_folder, prompts, tmp_path_factory):
    """(records, flags, folder)."""
    folder = tmp_path_factory.mktemp("forged")
    for name, lm in (("policy", policy_lm), ("user", user_lm)):
        save_params(folder / name, lm.params, lm.model.config, tokenizer_from=bpe_folder)
    profile = {"scene": "said goodbye", "main_cha": "calm", "cha_group": [], "task": "advice"}
    lines = [
        profile | {"id": f"p{i}", "player": "my sister " * (20 * i + 1)} | ({"first_talk": talk} if talk else {})
        for i, talk in enumerate(TALKS)
    ]
    (folder / "profiles.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.py").write_text(CONFIG)
    flags = [f"--config={folder / 'config.py'}"] + [f"--config.{k}={v}" for k, v in fields_of(folder, prompts).items()]
    config = config_from_flags(flags, "")[0]
    evaluation = of_agents(config, Agents.load(config, eval_spec(config)), chosen_profiles(config))
    records = [record for batch, _ in evaluation.batches(range(COUNT * REPEATS)) for record in batch]
    return json.loads(json.dumps(records)), flags, folder


@pytest.fixture
def check(world, capsys, tmp_path):
    """Verifies a log: (exit status, what was printed)."""

    def run(log, *more):
        file = tmp_path / "log.jsonl"
        if isinstance(log, bytes):
            file.write_bytes(log)
        else:
            write_dialogues(file, log)
        status = verify.main([str(file), *world[1], *more])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out + err

    return run


def faults_of(printed):
    return int(re.search(r"ties, (\d+) faults", printed)[1])


def test_the_honest_log(world, check):
    """Every way to end is in it, at the turn limit, too; replies that ended at their limit as well."""
    records = world[0]
    ends = {"success", "failure", "goodbye", "turn_limit", "format", "context"}
    assert {record["end_reason"] for record in records} == ends
    assert {record["turns"] for record in records} >= {1, 2, 3, TURNS}
    status, output = check(records)
    assert status == 0, output
    turns = sum(message["role"] == "user" for record in records for message in record["messages"][1:])
    assert f"recomputed 12 dialogues, {turns} turns" in output
    assert "0 ties, 0 faults" in output
    assert output.splitlines()[-1].partition("; not recomputed: ")[2].startswith("the policy's words and log-probs")
    assert check(list(reversed(records)))[0] == 0, "the order of an interrupted evaluation's lines says nothing"
    assert check(records, "--repeats=2")[0] == 0


def of(records, reason, turns=1):
    """The first dialogue that ended so, after so many turns at least."""
    return next(record for record in records if record["end_reason"] == reason and record["turns"] >= turns)


def replies(record):
    return record["messages"][1::2]


def reactions(record):
    return record["messages"][2::2]


def refit(record, end_reason):
    """Totals that fit the messages."""
    record["emotions"] = [record["messages"][0]["emotion"]] + [m["emotion"] for m in reactions(record)]
    record["emotions"] += record["emotions"][-1:] * (len(replies(record)) - len(reactions(record)))
    record["emotion"], record["turns"] = record["emotions"][-1], len(replies(record))
    record["violation"] = end_reason == "format"
    record["reward"] = 0.0 if record["violation"] else float(str(np.float32(record["emotion"] / 100)))
    record["end_reason"] = end_reason


def silence(user):
    """A last reaction as it is where the dialogue ends before a reply."""
    user |= {"content": None, "tokens": [], "all_tokens": [], "logprobs": [], "raw_logprobs": [], "stopped": False}
    for name in user["considerations"]:
        user["considerations"][name], user["consideration_stopped"][name] = "", False
        user["consideration_tokens"][name], user["consideration_logprobs"][name] = [], []


def cut(record, end_reason, turns=None, silent=True):
    """A dialogue cut at its best turn, or after `turns`."""
    emotions = [m["emotion"] for m in reactions(record)]
    turns = turns or int(np.argmax(emotions)) + 1
    del record["messages"][1 + 2 * turns :]
    if silent and turns < TURNS:
        silence(record["messages"][-1])
    refit(record, end_reason)


def tail_back(record):
    """Longer than it can be: its last turn twice."""
    record["messages"] += copy.deepcopy(record["messages"][-2:])
    last = reactions(record)[-1]
    last["emotion"] = int(np.clip(last["emotion"] + last["change"], 0, 100))
    refit(record, record["end_reason"])


def all_cut(end_reason, silent):
    def edit(records):
        for record in records:
            if reactions(record):
                cut(record, end_reason, silent=silent)

    return edit


def cut_in(reason, end_reason, silent):
    return lambda records: cut(of(records, reason, 2), end_reason, turns=1, silent=silent)


def renamed(reason, other):
    return lambda records: of(records, reason).update(end_reason=other)


def invented_violation(records):
    record = of(records, "turn_limit")
    del record["messages"][2:]
    record["messages"][1]["violation"] = True
    refit(record, "format")


def invented_violation_with_its_tokens(records):
    """Its say emptied as well."""
    record = of(records, "goodbye")
    del record["messages"][2:]
    record["messages"][1] |= {"violation": True, "content": "", "say_tokens": []}
    refit(record, "format")


def denied_violation(records):
    record = of(records, "format")
    replies(record)[-1]["violation"] = False
    record |= {"violation": False, "end_reason": "context", "reward": float(str(np.float32(record["emotion"] / 100)))}


def first_reply(records):
    return replies(of(records, "turn_limit"))[0]


def first_reaction(records):
    return reactions(of(records, "turn_limit"))[0]


def shown_reply_cut(records, also_all=False):
    user = next(u for r in records for u in reactions(r) if len(u["tokens"]) > 3)
    user["tokens"] = user["tokens"][:2]
    if also_all:
        for name in ("all_tokens", "logprobs", "raw_logprobs"):
            user[name] = user[name][:2]
        user["stopped"] = False
    user["content"] = decode(user["tokens"])


def decode(tokens):
    return PIECES[0].decode(tokens)


PIECES = []


@pytest.fixture(scope="module", autouse=True)
def _tokenizer(bpe):
    PIECES[:] = [bpe]


def set_path(path, value):
    """Edits one place of the first dialogue at its turn limit; a value may be a function of the old one."""

    def edit(records):
        target = of(records, "turn_limit")
        for name in path[:-1]:
            target = target[name]
        target[path[-1]] = value(target[path[-1]]) if callable(value) else value

    return edit


def shifted_emotions(records):
    """Five points more from the start on, in all sums."""
    record = of(records, "turn_limit")
    for message in record["messages"][::2]:
        message["emotion"] += 5
    record["initial_emotion"] += 5
    refit(record, record["end_reason"])


def swapped_ids(a, b):
    def edit(records):
        records[a]["dialogue"], records[b]["dialogue"] = records[b]["dialogue"], records[a]["dialogue"]

    return edit


def replaced_by_the_best(records):
    best = max(records, key=lambda record: record["emotion"])
    for i, record in enumerate(records):
        records[i] = copy.deepcopy(best) | {"dialogue": record["dialogue"]}


def replaced_under_its_profiles_name(records):
    best = max(records, key=lambda record: record["emotion"])
    other = next(r for r in records if r["profile"] != best["profile"])
    records[records.index(other)] = copy.deepcopy(best) | {n: other[n] for n in ("dialogue", "profile")}


def stop_token_moved(records):
    message = next(m for r in records for m in replies(r) if m["stopped"])
    message["stopped"] = False


def reply_made_longer(records):
    """Words of the policy in tokens, say and text alike, after its end."""
    message = first_reply(records)
    more = message["say_tokens"] * 8
    for name in ("tokens", "say_tokens"):
        message[name] = message[name][:-1] + more + message[name][-1:] if name == "tokens" else message[name] + more
    for name in ("logprobs", "raw_logprobs"):
        message[name] = message[name] + [-0.1] * len(more)
    message["content"] = decode(message["say_tokens"])


def line_end_in_the_middle(records):
    user = first_reaction(records)
    tokens = user["appraisal_tokens"]["feeling"]
    tokens[0] = PIECES[0].encode("\n")[0]
    user["appraisal"]["feeling"] = decode(tokens[: len(tokens) - user["appraisal_stopped"]["feeling"]])


# What a forger does, and words of a fault that tells it.
FORGED = {
    "all cut at their best": (
        all_cut("turn_limit", True),
        ["stops after turn 1, though nothing ends it there", "eval.max_turns=4"],
    ),
    "all cut at their best, replies kept": (all_cut("goodbye", False), ["stops after turn"]),
    "cut, as a success": (cut_in("turn_limit", "success", True), ["stops after turn 1, though nothing ends it"]),
    "cut, as if full": (cut_in("turn_limit", "context", False), ["stops after turn 1", "end_reason 'context'"]),
    "cut, as a goodbye": (cut_in("context", "goodbye", False), ["stops after turn 1", "end_reason 'goodbye'"]),
    "cut, still running": (cut_in("turn_limit", "running", False), ["stops after turn 1", "'running'"]),
    "before its failure": (cut_in("failure", "turn_limit", True), ["stops after turn 1"]),
    "goodbye for turn limit": (renamed("turn_limit", "goodbye"), ["end_reason is 'goodbye'", "for turn_limit"]),
    "success for turn limit": (renamed("turn_limit", "success"), ["end_reason is 'success'", "for turn_limit"]),
    "turn limit for failure": (renamed("failure", "turn_limit"), ["end_reason is 'turn_limit'", "for failure"]),
    "turn limit for goodbye": (renamed("goodbye", "turn_limit"), ["end_reason is 'turn_limit'", "for goodbye"]),
    "turn limit for context": (renamed("context", "turn_limit"), ["end_reason is 'turn_limit'", "for context"]),
    "context for format": (renamed("format", "context"), ["end_reason is 'context'", "for format"]),
    "unreadable": (renamed("goodbye", "unreadable"), ["end_reason is 'unreadable'"]),
    "goes on after a goodbye": (lambda rs: tail_back(of(rs, "goodbye")), ["goes on for 1 turns after its end"]),
    "goes on after the limit": (lambda rs: tail_back(of(rs, "turn_limit")), ["goes on for 1 turns after its end"]),
    "goes on in a full context": (lambda rs: tail_back(of(rs, "context")), ["it had no room in rollout.context"]),
    "invented violation": (invented_violation, ["violation is True, but by its tokens the policy kept to the format"]),
    "invented violation, say emptied": (
        invented_violation_with_its_tokens,
        ["kept to the format", "say's tokens"],
    ),
    "denied violation": (denied_violation, ["violation is False, but by its tokens the policy broke the format"]),
    "shown reply cut": (shown_reply_cut, ["the reply's tokens are not those that were generated"]),
    "whole reply cut": (lambda rs: shown_reply_cut(rs, True), ["2 tokens and no end of line"]),
    "first words": (set_path(["messages", 0, "content"], "I feel great"), ["text of the first utterance is not what"]),
    "first words and tokens": (
        lambda rs: rs[0]["messages"][0].update(content="my boss", tokens=PIECES[0].encode("my boss")),
        ["the first utterance is not the profile's"],
    ),
    "made up first words": (
        lambda rs: rs[1]["messages"][0].update(content="my boss"),
        ["text of the first utterance is not what its tokens say"],
    ),
    "made up, says the log": (set_path(["messages", 0, "generated"], True), ["generated is True, but the profile has"]),
    "thought emptied": (set_path(["messages", 1, "thought"], ""), ["the thought is not the one"]),
    "thought rewritten": (set_path(["messages", 1, "thought"], "I love them"), ["the thought is not the one"]),
    "thought without its end": (set_path(["messages", 1, "thought"], lambda t: t[:-2]), ["the thought is not the one"]),
    "no thought": (set_path(["messages", 1, "thought"], None), ["the thought is not the one"]),
    "say": (set_path(["messages", 1, "content"], "I love you"), ["the text of 'say' is not what its tokens say"]),
    "say cut": (
        lambda rs: first_reply(rs).update(
            say_tokens=first_reply(rs)["say_tokens"][:1], content=decode(first_reply(rs)["say_tokens"][:1])
        ),
        ["the say's tokens are not the end of what the policy generated"],
    ),
    "initial emotion": (set_path(["initial_emotion"], 30), ["initial_emotion is 30", "eval.initial_emotion=40"]),
    "all emotions shifted": (shifted_emotions, ["initial_emotion is 45", "eval.initial_emotion=40"]),
    "hidden intention": (set_path(["hidden_intention"], "praise"), ["hidden_intention is 'praise'"]),
    "profile": (set_path(["profile"], "p0"), ["profile is 'p0', but the config plays"]),
    "seed": (set_path(["seed"], 7), ["seed is 7, but eval.seed=58"]),
    "mode": (set_path(["mode"], "direct"), ["mode is 'direct', but the config's is 'think'"]),
    "language": (set_path(["language"], "zh"), ["language is 'zh', but the config's is 'en'"]),
    "style": (set_path(["style"], "challenging"), ["style is 'challenging'"]),
    "scenario": (set_path(["scenario"], None), ["scenario is None"]),
    "readout": (set_path(["readout"], "text"), ["readout is 'text', but the config's is 'sample'"]),
    "unbounded": (lambda rs: of(rs, "turn_limit").update(source="RLVER"), ["source names another program"]),
    "remote": (lambda rs: of(rs, "turn_limit").update(remote={}), ["remote is there"]),
    "infinite log-prob": (set_path(["messages", 1, "logprobs", 0], 1e300), ["log-probability 1 of"]),
    "positive log-prob": (set_path(["messages", 1, "raw_logprobs", 0], 0.5), ["expected a finite number up to 0"]),
    "log-prob below the model's": (set_path(["messages", 1, "logprobs", 1], -60.0), ["below the model's own"]),
    "null log-probs": (set_path(["messages", 1, "logprobs"], None), ["log-probabilities of 'logprobs' are null"]),
    "null log-prob": (set_path(["messages", 1, "logprobs", 0], None), ["'logprobs' are not all numbers"]),
    "log-prob in words": (set_path(["messages", 1, "raw_logprobs", 0], "-1"), ["'raw_logprobs' are not all numbers"]),
    "one log-prob less": (set_path(["messages", 1, "logprobs"], lambda x: x[1:]), ["tokens, but"]),
    "user's log-probs": (set_path(["messages", 2, "logprobs", 0], 3.0), ["the user's log-probability 1 of"]),
    "short distribution": (set_path(["messages", 2, "change_logprobs"], lambda x: x[1:]), ["21 tokens, but 20"]),
    "stop moved": (stop_token_moved, ["stopped is False, but tokens that end a reply stand at"]),
    "longer reply": (reply_made_longer, ["which the limits rule out"]),
    "line end within a field": (line_end_in_the_middle, ["tokens that end a line stand at [0"]),
    "stopped field": (
        set_path(["messages", 2, "appraisal_stopped", "feeling"], lambda x: not x),
        ["'feeling': stopped is", "the text of 'feeling' is not"],
    ),
    "consideration": (set_path(["messages", 2, "considerations", "tone"], "happy"), ["the text of 'tone' is not what"]),
    "appraisal without a text": (
        lambda rs: first_reaction(rs)["appraisal"].pop("feeling"),
        ["appraisal has the fields"],
    ),
    "appraisal with another": (lambda rs: first_reaction(rs)["appraisal"].update(x="y"), ["appraisal has the fields"]),
    "thought of a silent user": (
        lambda rs: reactions(of(rs, "turn_limit"))[-1]["consideration_stopped"].update(tone=True),
        ["what the user considered before a reply that is not there"],
    ),
    "a reply after the end": (
        lambda rs: reactions(of(rs, "turn_limit"))[-1].update(content="thank you"),
        ["the user replies, though the dialogue is over"],
    ),
    "no reply in the middle": (lambda rs: silence(first_reaction(rs)), ["goes on for", "and no reply"]),
    "one twice": (lambda rs: rs.append(copy.deepcopy(rs[2])), ["dialogues 2 are there more than once"]),
    "one dropped": (lambda rs: rs.pop(0), ["dialogues 0 are missing", "6 profiles, eval.num_profiles=100"]),
    "failures dropped": (
        lambda rs: [rs.remove(r) for r in list(rs) if r["end_reason"] == "failure"],
        ["are missing of those that the config plays: 0 to 11"],
    ),
    "all the best": (replaced_by_the_best, ["profile is"]),
    "the best as another's": (replaced_under_its_profiles_name, ["fault: dialogue"]),
    "renumbered": (lambda rs: rs[4].update(dialogue=400), ["dialogues 400 are none of", "dialogues 4 are missing"]),
    "swapped": (swapped_ids(0, 2), ["dialogue 0: profile is 'p2', but the config plays 'p0' in it"]),
    "repeats swapped": (swapped_ids(0, COUNT), ["not the user's own choice"]),
    "foreign": (
        lambda rs: rs.__setitem__(5, copy.deepcopy(rs[5]) | {"profile": "nobody"}),
        ["profile 'nobody' is not in data.eval or data.train"],
    ),
    "huge number": (set_path(["dialogue"], 10**40), ["dialogue is a number of many digits"]),
    "token as text": (set_path(["messages", 1, "tokens", 0], "7"), ["tokens of 'tokens' are not ids"]),
    "token as fraction": (set_path(["messages", 1, "say_tokens", 0], 7.0), ["tokens of 'say_tokens' are not ids"]),
    "token as truth": (set_path(["messages", 2, "all_tokens", 0], True), ["tokens of 'all_tokens' are not ids"]),
    "huge token": (set_path(["messages", 2, "tokens", 0], 10**30), ["tokens of 'tokens' are not ids"]),
    "tokens in tokens": (set_path(["messages", 1, "tokens", 0], [1]), ["tokens of 'tokens' are not ids"]),
    "a third role": (set_path(["messages", 1, "role"], "tool"), ["messages[1] has role 'tool'"]),
    "no field": (lambda rs: first_reply(rs).pop("say_tokens"), ["no field messages[1].say_tokens"]),
}


TOGETHER = [
    ("thought emptied", "first words", "hidden intention", "initial emotion", "goodbye for turn limit"),
    ("shown reply cut", "seed", "success for turn limit", "renumbered"),
    ("invented violation, say emptied", "one twice", "mode"),
    ("all cut at their best", "hidden intention", "say cut", "style"),
    ("null log-probs", "swapped", "turn limit for goodbye"),
    ("renumbered", "say", "consideration", "scenario", "log-prob below the model's"),
    ("denied violation", "context for format", "remote", "unbounded"),
    ("thought rewritten", "stop moved", "language", "failures dropped"),
]
TOLD_TOGETHER = {name for names in TOGETHER for name in names}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow][: name in TOLD_TOGETHER]) for name in FORGED]
)
def test_a_forged_log(world, check, name):
    edit, words = FORGED[name]
    records = copy.deepcopy(world[0])
    edit(records)
    assert records != world[0]
    status, output = check(records)
    assert status == 1, output
    assert faults_of(output) > 0
    for word in words:
        assert word in output
    assert f"recomputed {len(records)} dialogues" in output or "no field" in output or "role" in output, (
        "the others as well"
    )


@pytest.mark.parametrize("names", TOGETHER, ids="+".join)
def test_forgeries_together(world, check, names):
    """Each is told as it is alone."""
    records = copy.deepcopy(world[0])
    for name in names:
        FORGED[name][0](records)
    status, output = check(records)
    assert status == 1, output
    assert faults_of(output) >= len(names)
    for name in names:
        assert any(word in output for word in FORGED[name][1]), (name, output)


def lines_of(world):
    return [json.dumps(record).encode() for record in world[0]]


def nan(line):
    return re.sub(rb'"logprobs": \[[^,\]]+', b'"logprobs": [NaN', line, count=1)


MALFORMED = {
    "no JSON": (lambda line: line[:-1], "not a JSON object"),
    "NaN": (nan, "NaN is no number of JSON"),
    "infinity": (lambda line: nan(line).replace(b"NaN", b"-Infinity"), "-Infinity is no number of JSON"),
    "a number beyond all": (lambda line: nan(line).replace(b"NaN", b"-1e999"), "log-probability 1 of"),
    "two rewards": (
        lambda line: line.replace(b'"reward":', b'"reward": 1.0, "reward":'),
        "'reward' twice in an object",
    ),
    "bytes": (lambda line: line.replace(b"advice", b"adv\xff\xfe", 1), "can't decode byte 0xff"),
    "half a character": (lambda line: line.replace(b"advice", b"\\ud800", 1), "holds half of a surrogate pair"),
    "a blank line": (lambda line: b"  ", "is blank"),
    "a list": (lambda line: b"[1]", "found list, expected an object"),
    "deep": (
        lambda line: line.replace(b'"violation"', b'"x": ' + b"[" * 10**5 + b"]" * 10**5 + b', "violation"', 1),
        "",
    ),
    "deep, but read": (
        lambda line: line.replace(b'"tokens": [', b'"tokens": [' + b"[" * 300 + b"]" * 300 + b",", 1),
        "",
    ),
    "digits": (lambda line: line.replace(b'"turns": ', b'"turns": ' + b"9" * 5000, 1), "not a JSON object"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_line(world, check, tmp_path, name):
    """A fault with its place; the other dialogues are recomputed."""
    edit, words = MALFORMED[name]
    lines = lines_of(world)
    lines[2] = edit(lines[2])
    assert lines[2] != lines_of(world)[2]
    status, output = check(b"\n".join(lines) + b"\n")
    assert status == 1, output
    assert f"{tmp_path / 'log.jsonl'}:3" in output or "fault: dialogue 2" in output
    assert words in output
    assert re.search(r"recomputed 1[12] dialogues", output)


def test_the_last_line_cut_off(world, check, tmp_path):
    status, output = check(b"\n".join(lines_of(world))[:-50])
    assert status == 1
    assert f"{tmp_path / 'log.jsonl'}:12, dialogue 11: not a JSON object" in output
    assert "missing" not in output, "it is there, but cannot be read"
    assert check(b"\xef\xbb\xbf" + b"\r\n".join(lines_of(world)))[0] == 0, "of another editor, without a last line end"


@pytest.mark.parametrize("text", [b"", b"\n", b"{}\n", b"null"])
def test_a_log_without_a_dialogue(check, text):
    status, output = check(text)
    assert (status, faults_of(output)) == (1, 1 + bool(text))
    assert "no dialogue in it" in output


def test_a_part_on_purpose(world, check):
    subset = world[0][2:5]
    status, output = check(subset, "--partial")
    assert status == 0, output
    assert "the set of dialogues (--partial)" in output
    status, output = check([*subset, subset[0]], "--partial")
    assert status == 1
    assert "dialogues 2 are there more than once" in output


def test_repeats(world, check):
    status, output = check(world[0][:COUNT], "--repeats=2")
    assert status == 1
    assert "dialogues 6 to 11 are missing of those that the config plays: 0 to 11" in output
    assert check(world[0][:COUNT])[0] == 0, "the first repeat is an evaluation, too"
    assert check(world[0], "--repeats=1")[0] == 1
    assert check(world[0], "--config.eval.num_profiles=5")[0] == 1


def test_a_config_of_another_log(world, check):
    status, output = check(world[0], "--config.policy.mode=direct")
    assert status == 2
    assert "add --config.policy.mode=think" in output
    status, output = check([record | {"mode": "\x1b[2Jthink" + "x" * 999} for record in world[0]])
    assert status == 2
    assert "\x1b" not in output, "nothing of a log reaches the terminal as it is"
    assert len(output) < 500
    status, output = check([record | {"readout": "text"} for record in world[0]])
    assert status == 2, "nothing slips through as if it were an endpoint's"
    assert "its user was behind an endpoint, but the config has none" in output
    status, output = check(world[0], "--config.remote.policy.url=http://x/v1", "--config.remote.policy.model=m")
    assert status == 2
    assert "a policy on the device" in output
    status, output = check(world[0], "--config.eval.max_turns=3")
    assert status == 1
    assert "goes on for 1 turns after its end in turn 3" in output


def test_fields_that_others_added_are_named(world, check):
    records = copy.deepcopy(world[0])
    records[0]["measures"], records[1]["messages"][1]["note"] = {"x": 1}, "y"
    status, output = check(records)
    assert status == 0
    assert output.rstrip().endswith("field 'measures', field 'note' of messages")


def mutated(value, draw):
    """Something else in some place of a JSON value."""
    others = [None, True, -1, 10**30, 1.5, float("inf"), "x", [], {}, [[1]], {"a": [None]}, "\n", 2**31, -(2**63)]
    if isinstance(value, dict | list) and value and draw.random() < 0.85:
        key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        chance = draw.random()
        if chance < 0.1:
            del value[key]
        elif chance < 0.2 and isinstance(value, list):
            value.insert(key, copy.deepcopy(value[draw.randrange(len(value))]))
        elif chance < 0.2:
            value[f"{key}x"] = value.pop(key)
        else:
            value[key] = mutated(value[key], draw)
        return value
    return copy.deepcopy(draw.choice(others))


def test_mutations_are_faults_and_never_raise(world, check):
    """Eight dialogues at a time, each with one random change of its structure."""
    draw, silent = random.Random(0), 0
    for _ in range(12):
        records = copy.deepcopy(world[0])
        for i, record in enumerate(records[:8]):
            records[i] = mutated(record, draw)
        changed = sum(json.dumps(a) != json.dumps(b) for a, b in zip(records, world[0], strict=True))
        text = "".join(json.dumps(record) + "\n" for record in records).replace("Infinity", "1e999")
        status, output = check(text.encode(), "--partial")
        assert status == 1, output
        silent += changed - len(set(re.findall(r"log.jsonl:\d+|fault: dialogue \S+", output)))
    assert silent <= 9, "nearly every change is told"
