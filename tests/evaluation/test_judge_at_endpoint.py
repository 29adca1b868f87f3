"""Judges behind an endpoint, a real server on loopback: contexts, faults, interruptions, and whole command lines."""

import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from configs import debug
from rlver_jax.dialogues.sage import from_sage
from rlver_jax.endpoints.errors import EndpointError
from rlver_jax.evaluate import main
from rlver_jax.evaluation.forms import load_forms
from rlver_jax.evaluation.judge_at_endpoint import RemoteJudge, RemoteRater
from rlver_jax.evaluation.measures import LETTERS, SPEECH
from rlver_jax.evaluation.score import judge_transcripts, measure, measure_agreement
from rlver_jax.evaluation.transcripts import Transcript
from rlver_jax.profiles.schema import Profile
from tests.endpoints.server import ChatServer, digest, one_in_five, rule
from tests.evaluation.test_transcripts import write
from tests.test_serve import served

ROOT = Path(__file__).resolve().parents[2]
QUIET = Console(quiet=True)
CHANGES = {0: [5, -3, 0], 1: [10] * 6, 2: [-10, -10, -10, -5], 3: [4]}  # recorded, see conftest.py


def config_of(server, **fields):
    config = debug.get_config()
    config.remote.user.url, config.remote.user.model = server.url, "m"
    config.remote.deadline = 60
    config.update_from_flattened_dict(fields)
    return config


@pytest.fixture(scope="module")
def dialogues(results):
    return [Transcript(from_sage(r, i), Profile.from_json(r), r["id"]) for i, r in enumerate(results)]


def appraise(judge, dialogues, *, own):
    work: list = []
    by_index = dict(pair for batch in judge.appraise(dialogues, own=own, progress=work.append) for pair in batch)
    return [by_index[i] for i in range(len(dialogues))], work


def change_in(answer):
    return int(re.search(r"^\[change\] +(\S+)$", answer, re.MULTILINE)[1])


def asked_about(bodies, dialogue):
    """The requests about a dialogue, in the order of its turns."""
    who = f"You are this person: {dialogue.profile.persona.strip()}\n"
    ours = [body for body in bodies if body["messages"][0]["content"].startswith(who)]
    return sorted(ours, key=lambda body: len(body["messages"]))


def test_contexts_are_the_records_and_changes_the_servers(dialogues, results):
    with ChatServer() as server:
        appraisals, work = appraise(RemoteJudge.load(config_of(server), "far", None), dialogues[:1], own=False)
        (appraised,), bodies = appraisals, server.bodies
    assert len(work) == len(bodies) == 3
    for turn, (body, emotion) in enumerate(zip(asked_about(bodies, dialogues[0]), (40, 45, 42), strict=True)):
        system, cue, *spoken_messages, form = body["messages"]
        assert "my sister" in system["content"]
        assert "be heard" in system["content"]
        assert cue["content"] == "Begin."
        history = results[0]["history"][: 2 * turn + 2]
        assert [m["content"] for m in spoken_messages] == [m["content"] for m in history[:-1]]
        assert [m["role"] for m in spoken_messages] == [*["assistant", "user"] * turn, "assistant"], (
            "the user speaks as itself"
        )
        assert f'"""\n{history[-1]["content"]}\n"""' in form["content"]
        assert f"You feel {emotion}," in form["content"]
        assert body["temperature"] == 0
        assert appraised.changes[turn] == change_in(rule(body))
        assert appraised.emotions[turn + 1] == emotion + appraised.changes[turn]
        assert appraised.appraisals[turn]["content"].startswith("words ")
    assert appraised.change_logprobs == [[], [], []]
    spoken_messages = sum(len(rule(body).split()) for body in bodies)
    assert (appraised.remote["requests"], appraised.remote["completion_tokens"]) == (3, spoken_messages)
    assert appraised.remote["models"] == ["rule-1"]


def steady(change):
    return lambda body: f"[content] so\n[target] so\n[change] {change:+d}"


def test_an_own_emotion_goes_on_and_ends(dialogues):
    """+8 a turn from 40: the judge's ceiling of 64 is reached in the third, and nothing more is asked."""
    with ChatServer(steady(8)) as server:
        judge = RemoteJudge.load(config_of(server, **{"emotion.ceiling": 64}), "far", None)
        appraised, work = appraise(judge, dialogues, own=True)
        forms = [body["messages"][-1]["content"] for body in asked_about(server.bodies, dialogues[1])]
    assert appraised[1].emotions == [40, 48, 56, 64, 64, 64, 64]
    assert appraised[1].changes == [8, 8, 8, 0, 0, 0]
    assert [int(re.search(r"You feel (\d+),", form)[1]) for form in forms] == [40, 48, 56]
    assert len(work) == len(server.bodies) == 3 + 3 + 3 + 1


def test_faults_and_interruptions_change_nothing(dialogues, tmp_path):
    """A fifth of all requests fails; then the endpoint goes away in the middle, and the same judgement goes on."""
    config: dict = {"remote.concurrency": 1}
    with ChatServer() as server:
        whole = judge_transcripts(RemoteJudge.load(config_of(server, **config), "far", None), dialogues, None, QUIET)
        bodies = {json.dumps(body) for body in server.bodies}
    with ChatServer(fault=one_in_five(3)) as server:
        judge = RemoteJudge.load(config_of(server, **config), "far", tmp_path / "faults")
        result = judge_transcripts(judge, dialogues, tmp_path / "faults", QUIET)
        assert server.count > len(server.bodies)
        assert {json.dumps(body) for body in server.bodies} == bodies
    without_url = lambda s: s | {"settings": {k: v for k, v in s["settings"].items() if k != "remote.user.url"}}  # noqa: E731
    assert without_url(result) == without_url(whole)
    with ChatServer() as server:
        server.fault = lambda n: "" if n <= 6 else "404 gone"
        folder = tmp_path / "gone"
        with pytest.raises(EndpointError, match="gone"):
            judge_transcripts(RemoteJudge.load(config_of(server, **config), "far", folder), dialogues, folder, QUIET)
        server.fault = lambda n: ""
        assert judge_transcripts(
            RemoteJudge.load(config_of(server, **config), "far", folder), dialogues, folder, QUIET
        ) == (whole | {"settings": result["settings"] | {"remote.user.url": server.url}})
        assert sorted(json.dumps(body) for body in server.bodies) == sorted(bodies), "nothing was asked twice"


def test_what_it_cannot_say_is_left_out_of_agreement(dialogues):
    """The second dialogue's appraisals never hold a number, the others' do."""

    def mostly(body):
        return "well, well" if "person: my sister my sister\n" in body["messages"][0]["content"] else rule(body)

    with ChatServer(mostly) as server:
        result = measure_agreement(RemoteJudge.load(config_of(server), "far", None), dialogues, None, QUIET)
        own = [[change_in(rule(b)) for b in asked_about(server.bodies, dialogues[i])] for i in (0, 2, 3)]
    recorded = [change for i in (0, 2, 3) for change in CHANGES[i]]
    own = list(itertools.chain(*own))
    assert (result["n"], result["dialogues"], result["unanswered"]) == (8, 3, 6)
    assert "argmax" not in result
    assert result["text"]["mae"]["value"] == pytest.approx(np.abs(np.subtract(own, recorded)).mean())
    assert result["text"]["spearman"]["value"] == pytest.approx(stats.spearmanr(own, recorded).statistic)
    assert result["remote"]["requests"] == 8 + 3 * 6
    assert result["remote"]["asked_again"] == 2 * 6
    with (
        ChatServer(lambda body: "well, well") as server,
        pytest.raises(ValueError, match="far: not one appraisal could be read"),
    ):
        measure_agreement(RemoteJudge.load(config_of(server), "far", None), dialogues, None, QUIET)


def picks(body):
    """One of the choices of every line, by the whole request; a line of words where there are none."""
    number, lines = digest(body["messages"]), []
    for i, (name, choices) in enumerate(
        re.findall(r"^\[(\w+)\].*?(?:\(([^()]* / [^()]*)\))?$", last(body), re.MULTILINE)
    ):
        options = choices.split(" / ")
        lines.append(f"[{name}] {options[(number >> i) % len(options)] if choices else 'it heard her'}")
    return "\n".join(lines)


def last(body):
    return body["messages"][-1]["content"]


def fill(rater, asked):
    by_index = dict(pair for batch in rater.fill(asked, lambda work: None) for pair in batch)
    return [by_index[i] for i in range(len(asked))]


def test_forms_are_filled_in_by_text(dialogues):
    asked = [load_forms("en").ask(dialogue) for dialogue in dialogues[:2]]
    with ChatServer(picks, one_in_five(1)) as server:
        rated = fill(RemoteRater.load(config_of(server), "far", None), asked)
    answered = {last(body): picks(body) for body in server.bodies}
    assert len(answered) == len(server.bodies) == sum(len(one.forms) for one in asked)
    for one, rating in zip(asked, rated, strict=True):
        assert rating.remote["asked_again"] == 0
        for form, answers in zip(one.forms, rating.answers, strict=True):
            (answer,) = [a for text, a in answered.items() if text.startswith(one.text) and _is(form, text)]
            for step in form.steps:
                chosen = re.search(rf"^\[{step.name}\] (.*)$", answer, re.MULTILINE)[1]
                want = {o: float(o == chosen) for o in step.options} if step.options else "it heard her"
                assert answers[step.name] == want


def _is(form, text):
    return form.steps[0].literal.strip().splitlines()[0] in text


def test_choices_are_asked_for_again_and_no_mark_is_made_up(dialogues):
    """One is out of range at first, one always; the rest of their form stays."""

    def answer(body):
        text = picks(body)
        if "[core_insight]" in last(body):
            text = re.sub(r"\[core_insight\] .*", "[core_insight] 9", text) if "# The conv" in last(body) else "3"
        return re.sub(r"\[natural\] .*", "[natural] quite", text)

    asked = [load_forms("en").ask(dialogues[3])]
    with ChatServer(answer) as server:
        rated = fill(RemoteRater.load(config_of(server), "far", None), asked)[0]
        again = [b for b in server.bodies if "# The conversation" not in last(b)]
    capabilities, *_, reply = rated.answers
    assert capabilities["core_insight"] == {"1": 0, "2": 0, "3": 1, "4": 0, "5": 0}
    assert max(capabilities["empathic_depth"].values()) == 1
    assert capabilities["evidence"] == "it heard her"
    assert reply["natural"] == {}
    assert list(reply["strategy"]) == list(LETTERS)
    assert rated.remote["asked_again"] == len(again) == 1 + 2
    assert sorted(re.findall(r"^\[(\w+)\]", "\n".join(map(last, again)), re.MULTILINE)) == [
        *("core_insight", "natural", "natural")
    ], "only what is missing"
    records, _ = measure(Answered(rated), load_forms("en"), dialogues[3:], None, QUIET, SPEECH)
    assert records[0]["measures"]["replies"][0]["natural"] is None
    assert records[0]["measures"]["unanswered"] == 1


class Answered:
    name, settings = "answered", {}

    def __init__(self, rated):
        self.rated = rated

    def fill(self, asked, progress):
        yield [(0, self.rated)]


def both(body):
    """A user and a judge model at one address."""
    return rule(body) if last(body).startswith("The other person says") or "[reply]" in last(body) else talk(body)


def talk(body):
    return picks(body) if " / " in last(body) else rule(body)


JUDGE = """
from configs import debug


def get_config(arg=""):
    c = debug.get_config()
    c.remote.user.url, c.remote.user.model = {url!r}, "m"
    c.remote.user.price_out = 2.0
    return c
"""


def command(folder, url, *more):
    (folder / "far.py").write_text(JUDGE.format(url=url))
    fields = ["--config.eval.max_turns=3", "--config.remote.deadline=60", "--config.rollout.context=1600"]
    remote = [f"--config.remote.{side}.{name}" for side in ("policy", "user") for name in (f"url={url}", "model=m")]
    judges = [f"--judge={folder / 'far.py'}", f"--measures={folder / 'far.py'}"]
    return [f"--config={debug.__file__}", f"--out={folder / 'out'}", *fields, *remote, *judges, *more]


@pytest.fixture(scope="module")
def play_with_judges(tmp_path_factory):
    """An evaluation whose user, further judge and judge model are one server's: (folder, bodies)."""
    folder = tmp_path_factory.mktemp("judged")
    with ChatServer(both) as server:
        assert main(command(folder, server.url)) == 0
        return folder, [json.dumps(body) for body in server.bodies]


def test_the_playing_user_as_judge_says_the_same(play_with_judges):
    """Its requests are those of the play, so its answers are there already: no gap, and nothing is asked twice."""
    folder, bodies = play_with_judges
    summary = json.loads((folder / "out" / "summary.json").read_text())
    judge = summary["judges"]["far"]
    assert (judge["score"], judge["gap"], judge["unanswered"]) == (summary["score"], 0, 0)
    assert summary["score"] != 40
    assert judge["remote"]["requests"] == 24
    assert judge["remote"]["cost"] == pytest.approx(2 * judge["remote"]["completion_tokens"] / 1e6)
    assert judge["settings"]["remote.user.model"] == "m"
    assert "fingerprint.user" not in judge["settings"]
    forms = 8 * (4 + 3)
    assert len(bodies) == len(set(bodies)) == summary["remote"]["user"]["requests"] + 24 + forms
    measures = summary["measures"]
    assert measures["remote"]["requests"] == forms
    assert measures["capabilities/core_insight"]["n"] == 8
    assert sum(one["n"] for one in measures["strategies"].values()) == 24
    share = sum(one["acceptance"] * one["n"] for one in measures["strategies"].values() if one["n"]) / 24
    assert share == pytest.approx(summary["acceptance"])


@pytest.mark.slow
def test_judges_are_killed_and_taken_up_again(play_with_judges, tmp_path):
    """With faults; killed while the judge model is at work."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    with ChatServer(both, one_in_five(2)) as server:
        server.before = lambda: time.sleep(0.02)
        arguments = [sys.executable, "-m", "rlver_jax.evaluate", *command(tmp_path, server.url)]
        options = {"env": env, "cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        run = subprocess.Popen(arguments, **options)
        work = tmp_path / "out" / "measures.jsonl"
        while run.poll() is None and (not work.exists() or work.read_bytes().count(b"\n") < 2):
            time.sleep(0.01)
        run.kill()
        run.communicate()
        assert 2 <= work.read_bytes().count(b"\n") < 8
        assert not (tmp_path / "out" / "summary.json").exists()
        again = subprocess.Popen(arguments, **options)
        printed = again.communicate(timeout=120)[0]
        assert again.returncode == 0, printed
        bodies = [json.dumps(body) for body in server.bodies]
    assert set(bodies) == set(play_with_judges[1])
    assert len(bodies) - len(set(bodies)) <= 8, "at most what was on its way"
    lines = [
        sorted((folder / "out" / "dialogues.jsonl").read_text().splitlines())
        for folder in (play_with_judges[0], tmp_path)
    ]
    assert lines[0] == lines[1]
    ours, unbroken = (json.loads((f / "out" / "summary.json").read_text()) for f in (tmp_path, play_with_judges[0]))
    for one in (ours, unbroken):
        for part in (one["judges"]["far"], one["measures"]):
            part["settings"].pop("remote.user.url")
    assert ours["judges"] == unbroken["judges"]
    assert ours["measures"] == unbroken["measures"]


@pytest.mark.long
def test_a_judge_behind_our_own_server(dialogues):
    """Random weights seldom fill in a form, but they are asked, again as well, and answer alike each time."""
    asked = [load_forms("en").ask(dialogues[3])]
    with served("--rows=4", "--name=m", "--context=4000") as (_, url):
        config = config_of(SimpleNamespace(url=f"{url}/v1"), **{"remote.deadline": 600})  # on a busy machine, too
        first, second = (
            judge_transcripts(RemoteJudge.load(config, "far", None), dialogues, None, QUIET) for _ in range(2)
        )
        rated = fill(RemoteRater.load(config, "far", None), asked)[0]
    assert first == second
    assert first["remote"]["models"] == ["m"]
    assert first["remote"]["requests"] == 14 + first["remote"]["asked_again"] > 14
    assert first["remote"]["completion_tokens"] > 100
    assert rated.remote["requests"] == 5 + rated.remote["asked_again"] > 5
    assert [list(answers) for answers in rated.answers] == [[s.name for s in form.steps] for form in asked[0].forms]


def test_agreement_of_a_user_at_an_endpoint(results, tmp_path, capsys):
    file = write(tmp_path / "r.jsonl", results)
    with ChatServer() as server:
        remote = [f"--config.remote.user.url={server.url}", "--config.remote.user.model=m"]
        args = [f"--agreement={file}", f"--config={debug.__file__}", f"--out={tmp_path / 'out'}", *remote]
        assert main(args) == 0
        assert "14 contexts of 4 dialogues" in capsys.readouterr().out
        result = json.loads((tmp_path / "out" / "agreement.json").read_text())["user"]
        changes = sorted(change_in(rule(body)) for body in server.bodies)
        assert result["text"]["mean_change"]["own"] == pytest.approx(sum(changes) / 14)
        assert (result["n"], result["remote"]["requests"]) == (14, 14)
        assert main(args) == 0
        assert len(server.bodies) == 14
        server.fault = lambda n: "401 Incorrect API key"
        assert main([*args[:2], *remote]) == 2
        assert "Incorrect API key" in capsys.readouterr().err
        server.fault = lambda n: "500"
        assert main([*args[:2], *remote, "--config.remote.deadline=1"]) == 1
    assert "no answer within 1 s" in capsys.readouterr().err


def test_a_judge_without_its_key_is_refused_before_anything(results, tmp_path, capsys):
    file = write(tmp_path / "r.jsonl", results)
    text = JUDGE.format(url="http://127.0.0.1:9/v1")
    key = "    c.remote.user.key_env = 'NO_KEY'\n    return c"
    (tmp_path / "far.py").write_text(text.replace("    return c", key))
    assert main([f"--from={file}", f"--judge={tmp_path / 'far.py'}"]) == 2
    assert "NO_KEY': no such variable in the environment" in capsys.readouterr().err
