"""New profiles from seeds: by a loopback endpoint, continued where it stopped; by random weights on the device."""

import json

import pytest

from rlver_jax.profiles.schema import read_profiles
from rlver_jax.profiles.seeds import SIMILAR, read_seeds, similarity, text_of
from rlver_jax.reports.profiles_command import main
from rlver_jax.reports.profiles_generate import SHORTEST, profile_of
from tests.endpoints.server import ChatServer, digest

pytest.importorskip("rapidfuzz", reason="extra `generate` is not installed")
SEEDS = {
    "personas": [f"a person who repairs {what}" for what in ("bikes", "clocks", "roofs", "shoes")],
    "topics": ["a neighbour's noise", "a lost letter", "a promise that was broken"],
    "intentions": ["advice", "listening"],
}  # fmt: skip
FLAGS = ["--config=configs/debug.py", "--config.user.prompts="]


def write_seeds(folder):
    (folder / "seeds.json").write_text(json.dumps(SEEDS), encoding="utf-8")
    return folder / "seeds.json"


def words(*seed):
    """Forty words that hardly another seed has."""
    return " ".join(f"w{digest(*seed, i) % 10**6}" for i in range(40))


def test_seeds_are_pairs_of_which_none_comes_twice_and_personas_lie_on_one_side(tmp_path):
    seeds = read_seeds(write_seeds(tmp_path), 0.5, [])
    assert len({(seed.persona, seed.topic) for seed in seeds}) == len(seeds) == 12
    assert [seed.intention for seed in seeds] == ["advice", "listening"] * 6
    assert len({(seed.persona, seed.held_out) for seed in seeds}) == 4
    assert seeds == read_seeds(tmp_path / "seeds.json", 0.5, ["praise"])


def test_similarity_by_hand():
    """One of ten letters replaced: nine of ten are kept on either side."""
    assert similarity("abcdefghij", ["zzzz", "abcdefghiX"]) == pytest.approx(90)
    assert similarity("abc", []) == 0


def answer(body):
    text = body["messages"][-1]["content"]
    persona, topic = (text.split(f"{what}: ")[1].split("\n")[0] for what in ("A person", "What it is about"))
    if topic == "a lost letter":
        persona, topic = "the same", "always"  # a near-duplicate of the first of them
    about = {"player": "player", "temper": "calm", "scene": "scene", "first_talk": "first"}
    if "roofs" in text:
        about.pop("first_talk")  # not filled in
    return "\n".join(f"[{name}] {words(persona, topic, what)}" for name, what in about.items())


def test_an_endpoint_writes_profiles_that_are_new_and_checked(tmp_path, capsys):
    out = tmp_path / "new"
    with ChatServer(answer) as server:
        remote = [f"--config.remote.user.url={server.url}", "--config.remote.user.model=m"]
        remote += ["--config.remote.user.price_in=1", "--config.remote.user.price_out=1"]
        flags = ["generate", f"--seeds={write_seeds(tmp_path)}", f"--out={out}", "--held_out=0.5", *FLAGS, *remote]
        assert main([*flags, "--count=3"]) == 0
        assert main([*flags, "--count=12"]) == 1, "not as many are left"
        asked, sent = server.count, json.dumps(server.bodies).lower()
    assert not any(word in sent for word in ("advice", "listen", "wish")), "a writer that isn't told can't tell"
    train, test = (read_profiles(out / name) for name in ("train.jsonl", "test.jsonl"))
    # of 12 seeds 3 lack their first words; of the other 9, three are about the letter, all alike
    assert len(train) + len(test) == 7
    assert not {p.persona for p in train} & {p.persona for p in test}
    everyone = [text_of(profile) for profile in (*train, *test)]
    assert all(similarity(text, everyone[:i]) < SIMILAR for i, text in enumerate(everyone))
    assert asked == 12, "each seed once"
    assert {body["temperature"] for body in server.bodies} == {1.0}, "user.reply_temperature"
    told = capsys.readouterr().out
    assert "3 x first_talk: fewer than 12 characters" in told
    assert "2 x resembles another profile" in told
    assert "12 requests (0 asked again)" in told
    roomy = [*FLAGS, "--config.rollout.context=6144"]
    assert main(["check", str(out / "train.jsonl"), f"--eval={out}/test.jsonl", *roomy]) == 0
    assert main(["generate", f"--seeds={tmp_path}/seeds.json", f"--out={tmp_path}", "--count=1", *FLAGS, *remote]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_line_that_is_the_secret_wish_is_refused(tmp_path):
    """But for its full stop; a word of it may be said."""
    wish = "You want somebody to admit plainly that the company made the mistake"
    seed = read_seeds(write_seeds(tmp_path), 0.5, [])[0]
    lines = {"player": "Ann, 40, a baker", "temper": "calm", "scene": "A cake was recalled", "first_talk": wish + "."}
    assert profile_of(seed, wish, lines, 12) == (None, "first_talk: the secret wish itself")
    made, why = profile_of(seed, wish, lines | {"first_talk": "Your company sent me a cake that cuts fingers."}, 12)
    assert (made.first_talk, why) == ("Your company sent me a cake that cuts fingers.", "")


def test_how_short_a_line_may_be_depends_on_the_language(tmp_path):
    """Seven characters say as much in Chinese as twenty in English."""
    seed = read_seeds(write_seeds(tmp_path), 0.5, [])[0]
    lines = {
        "player": "王敏，34岁，护士",
        "temper": "温和",
        "scene": "母亲住院，没人照顾",
        "first_talk": "我妈昨天住院了",
    }
    assert profile_of(seed, "你想得到夸奖", lines, SHORTEST["zh"])[0].first_talk == "我妈昨天住院了"
    assert profile_of(seed, "你想得到夸奖", lines, SHORTEST["en"])[1].startswith(
        "player, scene, first_talk: fewer than 12"
    )


def test_seeds_that_are_none_are_explained(tmp_path, capsys):
    (tmp_path / "seeds.json").write_text('{"personas": [], "topics": ["a"]}')
    flags = ["generate", f"--seeds={tmp_path}/seeds.json", f"--out={tmp_path}/new", "--count=1", *FLAGS]
    assert main(flags) == 2
    assert "personas is [], expected a list of texts, at least one" in capsys.readouterr().err
    assert main(["generate", *FLAGS]) == 2
    assert "generate needs --seeds, --count and --out" in capsys.readouterr().err


@pytest.mark.slow
def test_random_weights_on_the_device_fill_in_lines_or_are_refused(tmp_path, capsys):
    flags = ["generate", f"--seeds={write_seeds(tmp_path)}", f"--out={tmp_path}/new", "--count=4", *FLAGS]
    status = main([*flags, "--config.user.field_tokens=16"])
    noted = json.loads((tmp_path / "new" / "progress.json").read_text())
    made = [profile for group in noted["profiles"].values() for profile in group]
    assert status == (0 if len(made) >= 4 else 1)
    assert len(made) + sum(bool(why) for why in noted["tried"].values()) == len(noted["tried"])
    assert all("\n" not in profile["player"] + profile["scene"] for profile in made)
