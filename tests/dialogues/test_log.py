"""A log holds what was played, to the bit, and a damaged one is refused with file and line."""

import json
import struct

import numpy as np
import pytest
import tokenizers

from configs.base import get_config
from rlver_jax.config.validate import reward_settings
from rlver_jax.dialogues.log import (
    DialogueLogError,
    dialogue_records,
    generated_tokens,
    read_dialogues,
    rewards_of,
    write_dialogues,
)


def bits(values):
    """float32 bit patterns, made without NumPy's parsing."""
    return [struct.pack("<f", float(value)) for value in values]


def test_every_row_but_padding_becomes_a_record(played, played_records, script):
    assert [r["dialogue"] for r in played_records] == played.ids
    assert [r["profile"] for r in played_records] == ["p0"] * 3 + ["p1"] * 3
    assert [r["end_reason"] for r in played_records] == [why for why, _ in script]
    assert [r["turns"] for r in played_records] == [3, 2, 1, 1, 2, 0]
    for r in played_records:
        settings = [r[name] for name in ("seed", "mode", "language", "style", "scenario")]
        assert settings == [5, "think", "en", "vanilla", "chit_chat"]
        assert (r["initial_emotion"], r["hidden_intention"], r["readout"]) == (40, "advice", "argmax")


def test_what_was_said_is_what_the_script_says(played_records, script):
    for record, (_, turns) in zip(played_records, script, strict=True):
        messages = iter(record["messages"][1:])
        for turn in turns:
            spoken = next(messages)
            assert spoken["role"] == "assistant"
            assert spoken["thought"] == turn.thought.partition("</think>")[0].strip()
            assert (spoken["content"], spoken["violation"]) == (turn.say or "", turn.say is None)
            if turn.say is None:
                continue
            heard = next(messages)
            assert (heard["role"], heard["content"], heard["change"]) == ("user", turn.reply, turn.change)
            assert heard["appraisal"] == turn.fields
            assert heard["appraisal_stopped"] == {"content": True, "feeling": not turn.cut}
            assert heard["considerations"] == {"tone": turn.tone if turn.reply else ""}
            assert heard["stopped"] == (turn.reply is not None and not turn.cut)
        assert next(messages, None) is None


def test_texts_are_their_tokens(played_records, bpe_folder):
    """Decoded by the tokenizers library, not by ours."""
    library = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))

    def decode(ids):
        return library.decode(ids, skip_special_tokens=True)

    for record in played_records:
        first, *messages = record["messages"]
        assert first["content"] == decode(first["tokens"])
        for m in messages:
            if m["role"] == "assistant":
                assert m["content"] == decode(m["say_tokens"])
                assert decode(m["tokens"]).startswith(m["thought"])
                assert decode(m["tokens"]).endswith(m["content"])
                continue
            assert m["content"] == (decode(m["tokens"]) or None)
            for kind, texts in (("appraisal", m["appraisal"]), ("consideration", m["considerations"])):
                for name, text in texts.items():
                    assert text == decode(m[f"{kind}_tokens"][name]).rstrip("\n")


def test_numbers_are_those_of_the_arrays(played, played_records):
    log = played.dialogues
    for row, record in enumerate(played_records):
        turn = -1
        for m in record["messages"][1:]:
            if m["role"] == "assistant":
                turn += 1
                completion, count = log.policy.completion, log.policy.completion.count[turn, row]
                assert m["tokens"] == list(completion.tokens[turn, row, :count])
                assert bits(m["logprobs"]) == bits(completion.logprob[turn, row, :count])
                assert bits(m["raw_logprobs"]) == bits(completion.raw_logprob[turn, row, :count])
                continue
            assert bits(m["change_logprobs"]) == bits(log.user.change_logprobs[turn, row])
            for position, name in enumerate(("content", "feeling")):
                count = log.user.appraisal.count[turn, position, row]
                assert m["appraisal_tokens"][name] == list(log.user.appraisal.tokens[turn, position, row, :count])
                raw = log.user.appraisal.raw_logprob[turn, position, row, :count]
                assert bits(m["appraisal_logprobs"][name]) == bits(raw)
            count = log.user.reply.count[turn, -1, row]
            assert m["all_tokens"] == list(log.user.reply.tokens[turn, -1, row, :count])
            assert m["tokens"] == m["all_tokens"][: len(m["all_tokens"]) - m["stopped"]]
            assert bits(m["raw_logprobs"]) == bits(log.user.reply.raw_logprob[turn, -1, row, :count])
            assert set(m["considerations"]) == {"tone"}
        assert turn + 1 == record["turns"]


def test_emotions_and_rewards(played_records):
    emotions = [[40, 45, 42, 42], [40, 50, 60], [40, 40], [40, 40], [40, 30, 30], [40]]
    assert [r["emotions"] for r in played_records] == emotions
    assert [r["emotion"] for r in played_records] == [42, 60, 40, 40, 30, 40]
    assert [r["violation"] for r in played_records] == [False, False, True, False, True, False]
    assert [r["reward"] for r in played_records] == [0.42, 0.6, 0.0, 0.4, 0.0, 0.4]
    after = [[m["emotion"] for m in r["messages"] if "emotion" in m] for r in played_records]
    assert after == [[40, 45, 42, 42], [40, 50, 60], [40], [40, 40], [40, 30], [40]]
    assert [r["messages"][0]["generated"] for r in played_records] == [False] * 3 + [True] * 3


def test_the_configs_reward_is_used(played):
    """`mixed`: a quarter of the final emotion, three quarters of the changes / 10; a fault counts as emotion 0."""
    config = get_config()
    config.reward.kind, config.reward.final_weight = "mixed", 0.25
    args = (played.dialogues, played.agents, played.profiles, played.ids)
    rewards = rewards_of(played.dialogues, reward_settings(config))
    actual = [r["reward"] for r in dialogue_records(*args, seed=0, rewards=rewards)]
    expected = [0.105 + 0.15, 0.15 + 1.5, 0.75 * -4, 0.1, 0.75 * -4, 0.1]
    assert actual == pytest.approx(expected, abs=1e-6)


def test_generated_tokens_count_what_the_arrays_count(played, played_records):
    log = played.dialogues
    total = log.policy.completion.count.sum() + log.user.appraisal.count.sum() + log.user.reply.count.sum()
    total += sum(int(log.first_count[row]) for row in (3, 4, 5))  # p1 has no first talk
    assert sum(map(generated_tokens, played_records)) == total


def test_reading_gives_back_what_was_written(played_records, tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    write_dialogues(path, played_records[:2])
    write_dialogues(path, played_records[2:4], append=True)
    assert read_dialogues(path) == played_records[:4]
    write_dialogues(path, played_records[4:])
    assert read_dialogues(path) == played_records[4:]
    assert [p.name for p in path.parent.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize("value", [0.1, -0.6931472, 1e-30, -3.4028235e38, 1.4e-45, -17.123456, 16777217.0])
def test_floats_read_back_as_the_same_float32(value):
    from rlver_jax.dialogues.log import _floats

    single = np.float32(value)
    text = json.dumps(_floats([single])[0])
    assert bits([np.float32(json.loads(text))]) == bits([single])
    assert len(text) <= 16


def test_an_unfinished_last_line_is_passed_over_or_replaced(played_records, tmp_path):
    path = tmp_path / "log.jsonl"
    write_dialogues(path, played_records[:2])
    with path.open("ab") as file:
        file.write(path.read_bytes()[:100])
    assert read_dialogues(path, unfinished=True) == played_records[:2]
    with pytest.raises(DialogueLogError, match=r"log.jsonl:3: not a JSON object"):
        read_dialogues(path)
    write_dialogues(path, played_records[2:3], append=True)
    assert read_dialogues(path) == played_records[:3]


def broken(record, change):
    record = json.loads(json.dumps(record))
    change(record)
    return json.dumps(record)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r.pop("seed"), "no field seed"),
        (lambda r: r.update(turns="3"), "field turns holds str, expected int"),
        (lambda r: r.update(turns=True), "field turns holds bool, expected int"),
        (lambda r: r["messages"].pop(1), "messages[1] has role"),
        (lambda r: r["messages"].append({"role": "system"}), "has role 'system', expected"),
        (lambda r: r.update(messages=[]), "messages is empty"),
        (lambda r: r["messages"][1].pop("say_tokens"), "no field messages[1].say_tokens"),
        (lambda r: r["emotions"].append(3), "emotions, but its messages hold"),
        (lambda r: r.update(end_reason="bored"), "end_reason is 'bored', expected one of running, success"),
    ],
)
def test_damaged_lines_are_named(played_records, tmp_path, change, says):
    record = played_records[0]
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps(record) + "\n" + broken(record, change) + "\n", encoding="utf-8")
    with pytest.raises(DialogueLogError) as error:
        read_dialogues(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert says in str(error.value)
    assert "remove it" in str(error.value)


@pytest.mark.parametrize("line", ["", "[]", "3", "{", '{"a": \ud83d}'.encode("utf-8", "replace").decode(), "null"])
def test_lines_that_are_no_object(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(DialogueLogError, match=r"log.jsonl:1: "):
        read_dialogues(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(DialogueLogError, match=r"none.jsonl: No such file"):
        read_dialogues(tmp_path / "none.jsonl")


def test_another_number_of_ids_is_refused(played):
    with pytest.raises(ValueError, match="5 dialogue ids for 2 profiles in groups of 3"):
        dialogue_records(played.dialogues, played.agents, played.profiles, played.ids[:5], seed=0, rewards=np.zeros(9))


def test_a_byte_order_mark_is_no_part_of_the_log(played_records, tmp_path):
    line = json.dumps(played_records[0]).encode()
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n")
    assert read_dialogues(tmp_path / "d.jsonl") == [json.loads(line)]
