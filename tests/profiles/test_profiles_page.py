"""docs/profiles.md: its example's files, written as the page has them, are checked, shown and warned of when spoilt."""

import json
import re
from pathlib import Path

import pytest

from configs import debug
from rlver_jax.config.validate import flatten
from rlver_jax.profiles.check import is_chinese, warnings_of
from rlver_jax.profiles.schema import Profile, read_profiles
from rlver_jax.reports.profiles_command import main
from rlver_jax.text.chat import ChatTemplate
from rlver_jax.text.tokenizer import load_tokenizer
from rlver_jax.user.profile_warnings import profile_warnings
from rlver_jax.user.prompts import load_prompts

PAGE = Path(__file__).resolve().parents[2] / "docs" / "profiles.md"
TOLD = ["--config=configs/debug.py:direct", "--config.data.language=en", "--config.rollout.context=6144"]


def write_example(folder: Path) -> Path:
    """The page's files, in a folder."""
    files = re.findall(r"^File `([\w./]+)`:\n\n```\w*\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    for name, text in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    assert len(files) == 7
    return folder / "support"


@pytest.fixture(scope="module")
def support(tmp_path_factory):
    return write_example(tmp_path_factory.mktemp("page"))


def told(support):
    return [*TOLD, f"--config.user.prompts={support}/prompts"]


def test_nothing_is_odd_in_the_example(support, capsys):
    assert main(["check", f"{support}/train.jsonl", f"--eval={support}/test.jsonl", *told(support)]) == 0
    out = capsys.readouterr().out
    assert "hidden intentions: settled 2, owned 2" in out
    assert out.endswith("nothing is odd\n")


def test_both_prompts_are_shown_with_their_tokens(support, capsys):
    assert main(["show", f"{support}/train.jsonl", "--profile=boots", *told(support)]) == 0
    out = capsys.readouterr().out
    entry = json.loads((support / "prompts/hidden_intentions.json").read_text("utf-8"))["owned"]
    for text in (
        "a hiking guide",
        entry["sentence"],
        entry["raises"],
        "You are a support agent",
        "I was charged twice",
    ):
        assert text in out
    assert out.count(entry["sentence"]) == 1, "the policy isn't told"
    system = out.split("[system]\n")[1].split("\n\n[user]")[0]
    cue = {"role": "user", "content": load_prompts("en", support / "prompts").opening}
    chat = ChatTemplate(load_tokenizer(debug.WORLD))
    tokens = len(chat.conversation([{"role": "system", "content": system}, cue]))
    assert f"=== the user, boots: {tokens} tokens" in out
    for name in ("appraisal", "reply"):
        assert (support / f"prompts/{name}.script").read_text("utf-8") in out


@pytest.mark.parametrize("action", ["check", "show"])
def test_a_profile_that_leaves_no_room_is_said_before_a_training_says_it(support, action, capsys):
    flags = [*told(support), "--config.rollout.context=704"]
    assert main([action, f"{support}/train.jsonl", *flags]) == 1
    out = capsys.readouterr().out
    said = re.search(
        r"warning: .*profile \w+ take (\d+) tokens, and a turn may take (\d+) more, .* is 704; raise it", out
    )
    longest = max(map(int, re.findall(r"takes \d+ to (\d+) tokens", out)), default=int(said[1]) - 3)
    assert int(said[1]) >= longest
    wide = int(said[1]) + int(said[2])
    assert main([action, f"{support}/train.jsonl", *told(support), f"--config.rollout.context={wide}"]) == 0
    assert main([action, f"{support}/train.jsonl", *told(support), f"--config.rollout.context={wide - 1}"]) == 1


def test_what_is_odd_is_said_one_by_one(support, tmp_path, capsys):
    rows = [json.loads(line) for line in (support / "train.jsonl").read_text("utf-8").splitlines()]
    rows += [rows[0] | {"id": "typo", "scene": "A third.", "task": "setled"}]
    rows += [rows[0] | {"id": "again"}, rows[1] | {"id": "odd", "scene": "Another.", "task": "You want a discount"}]
    spoilt = tmp_path / "spoilt.jsonl"
    spoilt.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps(rows[2] | {"id": "known"}), "utf-8")
    flags = [*told(support), "--config.data.language=zh"]
    assert main(["check", str(spoilt), f"--eval={held_out}", *flags]) == 1
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    for text in (
        "7 of 7 profiles are written not in Chinese (lamp, boots, crib, …), but data.language=zh",
        "2 of 7 profiles have a task that is none of the prompts' hidden intentions (1 x 'setled' of typo, did you "
        "mean 'settled'?; 1 x 'You want a discount' of odd): ",
        "Name one of the prompts' (settled, owned), or write an entry",
        "1 of 7 profiles have persona, scene and task of an earlier one (again as lamp)",
        "1 personas of the evaluation profiles are also trained on (1 of 1 profiles: known)",
    ):
        assert sum(text in line for line in warnings) == 1, text
    assert len(warnings) == 5, "the held-out profile's language is the fifth"


def test_train_and_evaluate_warn_of_the_same(support):
    config = debug.get_config()
    config.user.prompts = str(support / "prompts")
    config.data.train, config.data.eval = f"{support}/train.jsonl", f"{support}/test.jsonl"
    train, test = (read_profiles(flatten(config)[f"data.{name}"]) for name in ("train", "eval"))
    assert profile_warnings(config, train, test) == []
    config.user.prompts = ""
    # Our own prompts know neither intention; three of the tasks differ from each other as texts.
    first, second = profile_warnings(config, train, test)
    assert first.startswith("data.train: 4 of 4 profiles have a task that is none")
    assert second.startswith("data.eval: 2 of 2 profiles have a task that is none")
    config.data.language = "zh"
    warnings = profile_warnings(config, train, test)
    assert [text.split(" profiles ")[0] for text in warnings] == [
        "data.train: 4 of 4", "data.train: 4 of 4", "data.eval: 2 of 2", "data.eval: 2 of 2",
    ]  # fmt: skip


def test_prompts_that_tell_no_guidance_miss_no_task(support):
    """The debug world's prompts say the wish alone, whatever it is."""
    config = debug.get_config()
    assert profile_warnings(config, read_profiles(f"{support}/train.jsonl"), None) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("她四十一岁，在OK便利店工作。", True),
        ("Dana runs a café in 上海 and writes.", False),
        ("Дана", False),
        ("12", False),
    ],
)
def test_chinese_is_told_by_its_characters(text, expected):
    assert is_chinese(Profile("id", text, text, "wish", "calm")) == expected


def test_a_language_without_a_rule_is_not_judged():
    profile = Profile("id", "Une cliente pressée.", "La lampe est cassée.", "wish", "calm")
    assert warnings_of([profile], field="data.train", language="fr", known_task=None) == []


def test_what_is_no_action_is_named(capsys):
    assert main(["chek"]) == 2
    assert "expected check, show or generate" in capsys.readouterr().err
    assert main(["check"]) == 2
    assert "no profiles were given" in capsys.readouterr().err
