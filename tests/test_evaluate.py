"""`evaluate` as a user runs it: a process, two tiny models on disk, own prompts, made-up profiles."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from rlver_jax.evaluate import main
from rlver_jax.models.hf_weights import save_params
from tests.quick import QUICK

ROOT = Path(__file__).resolve().parents[1]
CONFIG = '''"""Tiny."""
from configs import base

def get_config(arg=""):
    c = base.get_config(arg)
    for model in (c.policy, c.user):
        model.dtype = model.param_dtype = "float32"
        model.scan_layers = False
    c.policy.mode = "direct"
    c.user.field_tokens, c.user.reply_tokens = 8, 12
    c.rollout.context, c.rollout.think_tokens, c.rollout.say_tokens = 900, 24, 12
    c.rollout.batch, c.rollout.max_turns = 2, 2
    c.eval.batch, c.eval.max_turns = 2, 2
    c.emotion.floor, c.emotion.initial, c.emotion.ceiling = 30, 40, 50
    c.data.language = "en"
    c.mesh.fsdp, c.mesh.tensor = 1, -1
    return c
'''


@pytest.fixture(scope="module")
def world(policy_lm, user_lm, bpe_folder, prompts, tmp_path_factory):
    """Folder with policy/, user/, profiles.jsonl (three, so that a batch of two is padded) and config.py."""
    folder = tmp_path_factory.mktemp("world")
    for name, lm in (("policy", policy_lm), ("user", user_lm)):
        save_params(folder / name, lm.params, lm.model.config, tokenizer_from=bpe_folder)
    with (folder / "profiles.jsonl").open("w", encoding="utf-8") as file:
        for i, talk in enumerate(["my boss did not listen.", None, "I felt awful"]):
            profile = {
                "id": f"p{i}",
                "player": "my sister " * (30 * i + 1),  # the longest prefix comes last
                "scene": "said goodbye",
                "main_cha": "calm",
                "cha_group": [],
                "task": "advice",
            }
            file.write(json.dumps(profile | ({"first_talk": talk} if talk else {})) + "\n")
    (folder / "config.py").write_text(CONFIG, encoding="utf-8")
    return folder, Path(prompts.origins["reply.script"]).parent


def arguments(world, *more, out="out"):
    folder, prompts = world
    return [
        f"--config={folder / 'config.py'}",
        f"--config.policy.path={folder / 'policy'}",
        f"--config.user.path={folder / 'user'}",
        f"--config.user.prompts={prompts}",
        f"--config.data.eval={folder / 'profiles.jsonl'}",
        f"--out={folder / out}",
        *more,
    ]


def process(world, *args, words=("-m", "rlver_jax.evaluate")):
    """Runs `evaluate` on one device; programs are compiled quickly, and kept for the next run."""
    env = os.environ | {"COLUMNS": "100", "XLA_FLAGS": QUICK}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *words, *args]
    return subprocess.run(command, env=env, cwd=world[0], capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def done(world):
    result = process(world, *arguments(world))
    assert result.returncode == 0, result.stdout + result.stderr
    return result, world[0] / "out"


SEVERAL = """
import contextlib, io, json, sys
from rlver_jax.evaluate import main
for words in map(json.loads, sys.argv[1:]):
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(words)
        except SystemExit as end:
            status = end.code
    print(json.dumps([status, *(x.buffer.getvalue().decode() for x in (out, err))]))
"""


@pytest.fixture(scope="module")
def later(world, done):
    """{name: (exit status, stdout, stderr)} of commands that a second process runs one after another."""
    whole, resumed = done[1], world[0] / "resumed"
    shutil.copytree(whole, world[0] / "judged")
    shutil.copytree(whole, resumed)
    (resumed / "summary.json").unlink()
    lines = (whole / "dialogues.jsonl").read_bytes().splitlines(keepends=True)
    (resumed / "dialogues.jsonl").write_bytes(lines[0] + lines[1] + lines[2][:200])
    progress = json.loads((resumed / "progress.json").read_text())
    progress["played"] = progress["played"][:1]
    (resumed / "progress.json").write_text(json.dumps(progress))
    commands = {
        "resumed": arguments(world, f"--before={whole}", out="resumed"),
        "judged": arguments(world, f"--judge={world[0] / 'user'},{world[0] / 'policy'}", out="judged"),
        "narrow": arguments(world, "--config.rollout.context=300", out="narrow"),
        "help": ["--help"],
    }
    result = process(world, *map(json.dumps, commands.values()), words=("-c", SEVERAL))
    assert result.returncode == 0, result.stderr
    return dict(zip(commands, map(json.loads, result.stdout.splitlines()), strict=True))


def decoder(world):
    """The tokenizers library's own decoding."""
    library = tokenizers.Tokenizer.from_file(str(world[0] / "policy" / "tokenizer.json"))
    return lambda ids: library.decode(ids, skip_special_tokens=True)


def test_texts_are_the_sampled_tokens(world, done):
    decode, appraised = decoder(world), 0
    for dialogue in read_lines(done[1] / "dialogues.jsonl"):
        for message in dialogue["messages"]:
            assert message["content"] == (decode(message["tokens"]) or message["content"] or None)
            if message["role"] == "assistant":
                assert message["content"] == decode(message["tokens"])
                assert len(message["logprobs"]) == len(message["raw_logprobs"]) == len(message["tokens"])
                assert message["stopped"] or len(message["tokens"]) == 12
            if "appraisal" in message:
                appraised += 1
                assert list(message["appraisal"]) == ["content", "feeling"]
                for name, ids in message["appraisal_tokens"].items():
                    assert decode(ids).rstrip("\n") == message["appraisal"][name]
                    assert len(ids) == len(message["appraisal_logprobs"][name])
                    assert message["appraisal_stopped"][name] or len(ids) == 8
                best = max(range(21), key=message["change_logprobs"].__getitem__)
                assert message["change"] == best - 10, "the likeliest option"
    assert appraised >= 3


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_summary_follows_from_the_dialogues(done):
    """Every number again from dialogues.jsonl, and from the messages rather than the totals."""
    result, out = done
    summary, dialogues = json.loads((out / "summary.json").read_text()), read_lines(out / "dialogues.jsonl")
    assert [d["profile"] for d in dialogues] == ["p0", "p1", "p2"]
    assert [d["dialogue"] for d in dialogues] == [0, 1, 2]
    finals, turns, generated = [], [], 0
    for d in dialogues:
        emotion = d["messages"][0]["emotion"]
        assert emotion == 40
        generated += len(d["messages"][0]["tokens"]) * (d["profile"] == "p1")
        for message in d["messages"][1:]:
            emotion += message.get("change", 0)
            generated += len(message["all_tokens"] if "all_tokens" in message else message["tokens"])
            for kind in ("appraisal_tokens", "consideration_tokens"):
                generated += sum(map(len, message.get(kind, {}).values()))
        finals.append(emotion)
        turns.append(sum(message["role"] == "assistant" for message in d["messages"]))
        assert d["reward"] == (0 if d["violation"] else emotion / 100)
    assert summary["score"] == pytest.approx(sum(finals) / 3)
    assert summary["success"] == sum(emotion >= 100 for emotion in finals)
    assert summary["failure"] == sum(emotion < 10 for emotion in finals)
    assert summary["n"] == 3
    assert summary["turns_mean"] == pytest.approx(sum(turns) / 3)
    reasons = [d["end_reason"] for d in dialogues]
    assert {k: v for k, v in summary["end_reasons"].items() if v} == {k: reasons.count(k) for k in reasons}
    assert summary["tokens"]["generated"] == generated
    assert summary["tokens"]["prefilled"] > 3 * 30
    assert "context" not in reasons, "its end would take a turn of a row"
    assert summary["occupancy"] == pytest.approx(sum(turns) / (2 * max(turns[:2]) + 2 * turns[2])), (
        "two rows, two batches"
    )
    assert summary["seconds"] > 0
    assert summary["settings"]["eval.temperature"] == 1.0
    assert "score" in result.stdout.splitlines()[-3], "the summary comes last"
    assert "3/3 dialogues" in result.stdout, "progress, without a terminal a line a batch"


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on(world, done, later):
    """After the first batch and half a line of the second: the same dialogues, none played twice."""
    whole, out = done[1], world[0] / "resumed"
    status, printed, error_text = later["resumed"]
    assert status == 0, error_text
    assert "before" in printed
    assert "mean final emotion, by the simulated user" in printed
    assert "2 of 3 dialogues are in" in printed
    first = (whole / "dialogues.jsonl").read_bytes().splitlines(keepends=True)[0]
    assert (out / "dialogues.jsonl").read_bytes().startswith(first)
    # The compiled program and the batch's shape are the same, so even the last bits are.
    assert read_lines(out / "dialogues.jsonl") == read_lines(whole / "dialogues.jsonl")
    ours, theirs = (json.loads((p / "summary.json").read_text()) for p in (out, whole))
    assert {k: v for k, v in ours.items() if k != "seconds"} == {k: v for k, v in theirs.items() if k != "seconds"}


def test_the_playing_user_as_judge_says_the_same(world, done, later):
    """And a judge in its place that was never trained on says something else; nothing is played again."""
    out = world[0] / "judged"
    status, printed, error_text = later["judged"]
    assert status == 0, error_text
    assert "3 of 3 dialogues are in" in printed
    summary, dialogues = json.loads((out / "summary.json").read_text()), read_lines(out / "dialogues.jsonl")
    before = json.loads((done[1] / "summary.json").read_text())
    assert {name: summary[name] for name in before} == before
    assert list(summary["judges"]) == ["user", "policy"]
    own, other = summary["judges"].values()
    assert (own["score"], own["gap"]) == (summary["score"], 0)
    assert other["gap"] == pytest.approx(summary["score"] - other["score"])
    lines = {line["dialogue"]: line for line in read_lines(out / "judges" / "user.jsonl")}
    other_lines = read_lines(out / "judges" / "policy.jsonl")
    for dialogue in dialogues:
        line = lines[dialogue["dialogue"]]
        error_text = [message for message in dialogue["messages"] if "change" in message]
        assert line["changes"] == [message["change"] for message in error_text]
        assert line["appraisals"] == [message["appraisal"] for message in error_text]
        assert line["emotions"] == dialogue["emotions"]
        for ours, message in zip(line["change_logprobs"], error_text, strict=True):
            assert ours == pytest.approx(message["change_logprobs"], abs=1e-4)
    assert [line["change_logprobs"] for line in other_lines] != [line["change_logprobs"] for line in lines.values()]


@pytest.mark.slow
def test_measures_stand_with_the_dialogues(world, done):
    out = world[0] / "measured"
    shutil.copytree(done[1], out)
    result = process(world, *arguments(world, f"--measures={world[0] / 'user'}", out="measured"))
    assert result.returncode == 0, result.stderr
    summary, dialogues = json.loads((out / "summary.json").read_text()), read_lines(out / "dialogues.jsonl")
    for dialogue, before in zip(dialogues, read_lines(done[1] / "dialogues.jsonl"), strict=True):
        measures = dialogue.pop("measures")
        assert dialogue == before
        assert measures["coordinate"].keys() == {"creative", "empathy"}
        assert len(measures["replies"]) == dialogue["turns"]
    assert summary["measures"]["coordinate/empathy"]["n"] == 3


def refused(world, capsys, *args):
    before = sorted(p.name for p in world[0].iterdir())
    assert main(list(args)) == 2
    assert sorted(p.name for p in world[0].iterdir()) == before, "nothing is left behind"
    return capsys.readouterr().err


def test_an_evaluation_to_compare_with_must_be_there(world, capsys):
    message = refused(world, capsys, *arguments(world, "--before=nowhere", out="compared"))
    assert "nowhere: holds no finished evaluation" in message


def test_other_settings_are_refused(world, done, capsys):
    before = (done[1] / "dialogues.jsonl").read_bytes()
    message = refused(world, capsys, *arguments(world, "--config.eval.seed=1"))
    for part in ("other settings", "eval.seed was 0, is 1", "name another --out"):
        assert part in message
    message = refused(world, capsys, *arguments(world, f"--checkpoint={world[0] / 'user'}"))
    assert "fingerprint.policy was" in message
    assert (done[1] / "dialogues.jsonl").read_bytes() == before


def test_dialogues_of_unknown_origin_are_refused(world, done, capsys, tmp_path):
    shutil.copy(done[1] / "dialogues.jsonl", tmp_path)
    args = [a for a in arguments(world) if not a.startswith("--out")]
    assert "no progress.json" in refused(world, capsys, *args, f"--out={tmp_path}")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--config.eval.btch=3"], "eval.btch=3: unknown field; did you mean eval.batch?"),
        (["--config.evl.batch=3"], "evl.batch=3: unknown field; did you mean eval.batch?"),
        (["--config.eval.batch=many"], "invalid literal"),
        (["--config.policy.mode=thikn"], "did you mean 'think'"),
        (["--no_such_flag=1"], "Unknown command line flag 'no_such_flag'"),
        (["something"], "found 'something', expected flags only"),
        (["--config.data.eval="], "data.eval and data.train are empty"),
        (["--config.user.path="], "user.path is empty"),
        (["--config=configs/none.py"], "none.py"),
    ],
)
def test_bad_usage(world, args, says, capsys, tmp_path):
    flags = [a for a in arguments(world) if not a.startswith("--out")]
    message = refused(world, capsys, *flags, f"--out={tmp_path / 'new'}", *args)
    assert says in message, message
    assert not (tmp_path / "new" / "progress.json").exists(), "a corrected command can use the folder"


def test_missing_flags(world, capsys):
    assert "no --config was given" in refused(world, capsys)
    args = [a for a in arguments(world) if not a.startswith("--out")]
    assert "no --out was given" in refused(world, capsys, *args)


def test_bad_usage_exits_with_2_and_help_with_0(world, later, capsys):
    assert main(["--config=nowhere.py", "--out=x"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "nowhere.py" in told.err
    # Found only once the models are loaded; the folder stays free for the corrected command.
    status, _, error_text = later["narrow"]
    assert status == 2
    assert "raise it to" in error_text
    assert not list((world[0] / "narrow").iterdir())
    status, printed, _ = later["help"]
    assert status == 0
    for flag in ("--config", "--checkpoint", "--out"):
        assert flag in printed
