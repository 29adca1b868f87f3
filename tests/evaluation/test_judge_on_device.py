"""The judge on the device against plain forward passes over contexts that are concatenated here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.dialogues.sage import from_sage
from rlver_jax.evaluation.judge_on_device import DeviceJudge, message_tokens
from rlver_jax.evaluation.transcripts import Transcript
from rlver_jax.profiles.schema import Profile
from rlver_jax.rollout.agents import Agents
from rlver_jax.rollout.spec import RolloutConfig
from rlver_jax.text.chat import ChatTemplate
from rlver_jax.user.emotion import EmotionRules
from rlver_jax.user.turn import UserLimits
from tests.conftest import SHORT_PROMPTS, literals, option_logprobs, plain

FIELD = 6  # tokens of a field at most
RULES = EmotionRules(40, floor=36, ceiling=44)
LITERALS = SHORT_PROMPTS["appraisal.script"]


def make_judge(user_lm, bpe, prompts, readout="argmax"):
    spec = RolloutConfig("direct", False, 1, 4, 900, 16, 12, FIELD, readout, RULES)
    agents = Agents.build(user_lm, user_lm, bpe, prompts, spec, style="vanilla", scenario="heart_to_heart")
    return DeviceJudge("tiny", agents, UserLimits(jnp.int32(FIELD), jnp.int32(0), jnp.float32(0)), 3, {})


@pytest.fixture(scope="module")
def dialogues(results):
    return [Transcript(from_sage(r, i), Profile.from_json(r), r["id"]) for i, r in enumerate(results)]


def appraise(judge, dialogues, own):
    done: list = [None] * len(dialogues)
    work = []
    for batch in judge.appraise(dialogues, own=own, progress=work.append):
        for i, appraised in batch:
            done[i] = appraised
    return done, work


@pytest.fixture(scope="module")
def fixed(user_lm, bpe, prompts, dialogues):
    return appraise(make_judge(user_lm, bpe, prompts), dialogues, own=False)


def band(emotion):
    return "FCBAS"[int(np.digitize(emotion, [10, 40, 70, 100]))]


def contexts(bpe, dialogue):
    """Ids before each appraisal, as messages one after another."""
    chat, p = ChatTemplate(bpe), dialogue.profile
    ids = chat.message("system", f"{p.persona.strip()}\n{p.scene}\n{p.hidden_intention}") + chat.message("user", "Go.")
    messages = dialogue.record["messages"]
    for heard, spoken, after in zip(messages[::2], messages[1::2], [*messages[2::2]], strict=False):
        ids = ids + chat.message("assistant", heard["content"]) + chat.message("user", spoken["content"])
        yield ids + chat.open("assistant"), after


def greedy_line(lm, bpe, ids):
    """The likeliest line, token by token; a field is not empty and no line end hides within a token."""
    pieces = [b"" if i in bpe.special_ids.values() else bpe.token_bytes(i) for i in range(bpe.vocab_size)]
    line: list[int] = []
    for _ in range(FIELD):
        logp = plain(lm, [ids + line])[1][0][-1].copy()
        for i in range(len(logp)):
            piece = pieces[i] if i < len(pieces) else b""
            stop = i in (bpe.im_end_id, bpe.pad_id)
            if (not piece and not stop) or b"\n" in piece[1:] or (not line and not piece.strip()):
                logp[i] = -np.inf
        token = int(logp.argmax())
        if token in (bpe.im_end_id, bpe.pad_id) or pieces[token].startswith(b"\n"):
            break
        line.append(token)
    return line


def by_hand(user_lm, bpe, ids, emotion):
    """(texts, log-probabilities of the changes) of one appraisal at an emotion."""
    *lines, last = literals(LITERALS, emotion, band(emotion))
    texts = []
    for literal in lines:
        ids = ids + bpe.encode(literal)
        line = greedy_line(user_lm, bpe, ids)
        texts.append(bpe.decode(line))
        ids = ids + line
    return texts, option_logprobs(user_lm, bpe, ids + bpe.encode(last))


def test_contexts_are_the_record_and_appraisals_the_judges_own(fixed, user_lm, bpe, dialogues):
    best = []
    for dialogue, appraised in zip(dialogues, fixed[0], strict=True):
        emotion = 40
        for turn, (ids, after) in enumerate(contexts(bpe, dialogue)):
            texts, logprobs = by_hand(user_lm, bpe, ids, emotion)
            np.testing.assert_allclose(appraised.change_logprobs[turn], logprobs, atol=1e-4)
            assert list(appraised.appraisals[turn].values()) == texts
            assert appraised.changes[turn] == int(logprobs.argmax()) - 10
            assert appraised.emotions[turn + 1] == min(100, max(0, emotion + appraised.changes[turn]))
            emotion = after["emotion"]  # the recorded one, whatever the judge made of the turn
            best.append(logprobs.max())
    assert len(best) == 14
    assert np.ptp(best) > 0.1, "a judge that says the same of everything proves little"


def test_every_turn_is_counted(fixed, dialogues):
    done, work = fixed
    assert [len(appraised.changes) for appraised in done] == [3, 6, 4, 1]
    assert sum(w.turns for w in work) == 14
    assert all(len(appraised.emotions) == len(appraised.changes) + 1 for appraised in done)
    assert sum(w.tokens for w in work) <= 14 * 2 * FIELD


def test_neighbours_in_the_batch_change_nothing(fixed, user_lm, bpe, prompts, dialogues):
    other, _ = appraise(make_judge(user_lm, bpe, prompts), dialogues[::-1], own=False)
    for a, b in zip(fixed[0], other[::-1], strict=True):
        assert (a.changes, a.appraisals) == (b.changes, b.appraisals)
        np.testing.assert_allclose(a.change_logprobs, b.change_logprobs, atol=1e-4)


def test_an_own_emotion_follows_the_own_changes(user_lm, bpe, prompts, dialogues):
    """The emotion that the judge reads is where its own changes have led; past its end it reads nothing more."""
    judge = make_judge(user_lm, bpe, prompts)
    done, work = appraise(judge, dialogues, own=True)
    appraised = 0
    for dialogue, judgement in zip(dialogues, done, strict=True):
        emotion, over = 40, False
        for turn, (ids, _) in enumerate(contexts(bpe, dialogue)):
            if over:
                assert (judgement.changes[turn], judgement.change_logprobs[turn], judgement.appraisals[turn]) == (
                    0,
                    [],
                    {},
                )
                assert judgement.emotions[turn + 1] == emotion
                continue
            _, logprobs = by_hand(user_lm, bpe, ids, emotion)
            np.testing.assert_allclose(judgement.change_logprobs[turn], logprobs, atol=1e-4)
            assert judgement.changes[turn] == int(logprobs.argmax()) - 10
            emotion += judgement.changes[turn]
            assert judgement.emotions[turn + 1] == emotion
            over, appraised = not 36 < emotion < 44, appraised + 1
    assert sum(w.turns for w in work) == appraised
    assert 4 < appraised < 14, "some end early, some don't"


def test_a_dialogue_without_an_appraisal_keeps_its_emotion(user_lm, bpe, prompts, dialogues):
    record = dialogues[0].record | {"messages": dialogues[0].record["messages"][:1], "emotions": [40], "turns": 0}
    silent = dataclasses.replace(dialogues[0], record=record)
    done, _ = appraise(make_judge(user_lm, bpe, prompts), [silent], own=True)
    assert done[0].emotions == [40]
    assert done[0].changes == []


def test_logged_tokens_are_used_where_they_spell_the_text(bpe):
    text = "my boss did not listen."
    odd = [t for char in text for t in bpe.encode(char)]  # no merges
    assert odd != bpe.encode(text)
    assert message_tokens(bpe, {"content": text, "say_tokens": odd}) == odd
    assert message_tokens(bpe, {"content": text, "tokens": odd[:-1]}) == bpe.encode(text)
    assert message_tokens(bpe, {"content": text, "tokens": [10**6]}) == bpe.encode(text)
    assert message_tokens(bpe, {"content": text, "tokens": None}) == bpe.encode(text)


def test_a_sampling_judge_draws_what_the_player_would(user_lm, bpe, prompts, dialogues):
    """With keys of the dialogue's seed and number, whatever its batch."""
    judge = make_judge(user_lm, bpe, prompts, readout="sample")
    once, _ = appraise(judge, dialogues, own=False)
    for appraised, dialogue in zip(once, dialogues, strict=True):
        number = dialogue.record["dialogue"]
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), number)
        for turn, change in enumerate(appraised.changes):
            noise = jax.random.fold_in(jax.random.fold_in(key, turn), 1)
            scores = jnp.asarray(appraised.change_logprobs[turn]) + jax.random.gumbel(noise, (21,))
            assert change == int(scores.argmax()) - 10
