"""Logged dialogues as examples: of an own log the distributions that it was played with; of texts what play gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from rlver_jax.evaluation.transcripts import Transcript, read_finished
from rlver_jax.learning import sft_loss
from rlver_jax.learning.packing import assign_rows
from rlver_jax.learning.sft_loss import FieldLoss
from rlver_jax.learning.sft_rows import Capacity, pack_rows
from rlver_jax.models.attention import BRANCH_RADIX
from rlver_jax.rollout.agents import Agents
from rlver_jax.text.tokenizer import load_tokenizer
from rlver_jax.training.sft_examples import LoggedModeExamples, PolicyExamples, UserExamples, as_line
from rlver_jax.user.prompts import LANGUAGES, load_prompts
from rlver_jax.user.prompts.shorten import free_fields, with_fields, write_prompts
from tests.conftest import SHORT_PROMPTS, make_profiles
from tests.learning.plain_sft import transcripts
from tests.test_verify import PROFILES, make_agents, play
from tests.text.conftest import write_qwen3


@pytest.fixture(scope="module")
def log(policy_lm, user_lm, bpe, prompts):
    """(agents, transcripts) of dialogues that two tiny models have played, replies sampled, changes drawn."""
    agents, profiles = make_agents(policy_lm, user_lm, bpe, prompts, "sample"), make_profiles(PROFILES)
    known = {profile.id: profile for profile in profiles}
    return agents, [Transcript(r, known[r["profile"]], str(r["dialogue"])) for r in play(agents, profiles)]


def user_examples(agents, **limits):
    return UserExamples(agents, **({"field_tokens": 12, "reply_tokens": 16, "soft": 0} | limits))


def forced(lm, examples, make, length=704):
    """Of each example: log p of its targets, and of all options of its changes."""
    of = FieldLoss(lm.model, len(make.fields))
    logprobs = jax.jit(lambda params, rows: of.logprobs(params, of.hidden(params, rows), rows))
    measure = jax.jit(lambda params, rows, first: sft_loss.measure(of, params, rows, make.options, first))
    results = []
    for one in examples:
        rows, choices = pack_rows([one], assign_rows(np.array([len(one)]), length, 1), length, 1, Capacity.of(examples))
        row = jax.tree.map(lambda x: jnp.asarray(x[0]), rows)
        changes = measure(lm.params, row, choices.first[0])[1]
        results.append((np.asarray(logprobs(lm.params, row))[0, : len(one.at)], np.asarray(changes)[0]))
    return results


def test_without_replies_changes_are_judged_the_same(log):
    """What was said is read by later turns, in rows without the reply script."""
    agents, dialogues = log
    whole, short = user_examples(agents), user_examples(agents)
    short.replies = False
    examples, shorter = ([make.example(one) for one in dialogues] for make in (whole, short))
    assert sum(map(len, shorter)) < 0.8 * sum(map(len, examples))
    every, some = forced(agents.user, examples, whole), forced(agents.user, shorter, short)
    for one, (_, expected), (_, actual) in zip(shorter, every, some, strict=True):
        count = len(one.changes)
        np.testing.assert_allclose(actual[:count], expected[:count], atol=1e-5)
        assert {short.fields[field] for field in one.field} == {"content", "feeling", "change"}


def test_a_users_own_log_is_read_as_it_was_played(log):
    """Teacher forcing gives the logged log-probabilities of every token of every field, and of all 21 options."""
    agents, dialogues = log
    make = user_examples(agents)
    examples = [make.example(one) for one in dialogues]
    assert make.fields == ["content", "feeling", "change", "tone", "reply"]
    assert make.left_out == {}
    tokens = 0
    for one, example, (logprobs, changes) in zip(dialogues, examples, forced(agents.user, examples, make), strict=True):
        users = [m for m in one.record["messages"][1:] if m["role"] == "user"]
        wanted = []
        for user in users:
            fields = [*user["appraisal_logprobs"].values(), *user["consideration_logprobs"].values()]
            wanted += [x for field in fields for x in field] + user["raw_logprobs"]
        tokens += len(wanted)
        np.testing.assert_allclose(logprobs[: len(wanted)], wanted, atol=1e-4)
        options = [user["change_logprobs"] for user in users]
        np.testing.assert_allclose(changes[: len(users)], options, atol=1e-4)
        chosen = sum(user["change_logprobs"][user["change"] + 10] for user in users)
        assert logprobs[len(wanted) :].sum() == pytest.approx(chosen, abs=1e-3), "the change's targets"
        assert example.changes.tolist() == [user["change"] for user in users]
        assert example.emotions.tolist() == [one.record["initial_emotion"], *(user["emotion"] for user in users[:-1])]
        assert example.replies.tolist() == list(range(len(users)))
    assert tokens > 200


@pytest.mark.parametrize("mode", ["think", pytest.param("direct", marks=pytest.mark.slow)])
def test_a_policys_own_log_is_read_as_it_was_played(log, mode, policy_lm, user_lm, bpe, prompts):
    agents, dialogues = log
    if mode == "direct":
        spec = dataclasses.replace(agents.spec, mode="direct")
        agents = Agents.build(policy_lm, user_lm, bpe, prompts, spec, style="vanilla", scenario="heart_to_heart")
        known = {one.profile.id: one.profile for one in dialogues}
        records = play(agents, list(known.values()))
        dialogues = [Transcript(r, known[r["profile"]], str(r["dialogue"])) for r in records]
    make = PolicyExamples(agents, min_change=-10, say_tokens=20)
    examples = [make.example(one) for one in dialogues]
    closing = bpe.encode("\n</think>\n\n")
    forced_closing = 0
    for one, example, (logprobs, _) in zip(dialogues, examples, forced(agents.policy, examples, make), strict=True):
        wanted, thoughts = [], 0
        for message in one.record["messages"][1::2]:
            raw, tokens = list(message["raw_logprobs"]), message["tokens"]
            start = agents.spec.think_tokens - len(closing)
            if mode == "think" and tokens[start : start + len(closing)] == closing:  # put there by the sampler
                raw[start : start + len(closing)] = []
                forced_closing += 1
            wanted += raw
        np.testing.assert_allclose(logprobs, wanted, atol=1e-4)
        thoughts = (example.field == 0).sum()
        assert 0 < thoughts < len(wanted) if mode == "think" else make.fields == ["reply"]
    assert mode == "direct" or forced_closing < sum(len(one.record["messages"]) // 2 for one in dialogues)


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ({"style": "challenging", "scenario": None}, "challenging chit_chat who"),
        ({"style": None, "scenario": "heart_to_heart"}, "vanilla heart_to_heart who"),
    ],
)
def test_a_log_says_which_user_it_was(log, told, wanted, tmp_path):
    """A user of another style reads another system prompt; the agents' own are those of files that don't say."""
    (tmp_path / "user_system.j2").write_text(
        "{{ style }} {{ scenario }} {{ persona }}{{ scene }}{{ hidden_intention }}"
    )
    (tmp_path / "appraisal.script").write_text("Change:\n<<choose:change>>")
    (tmp_path / "reply.script").write_text("Say:<<free:reply>>")
    own = {"style": "vanilla", "scenario": "chit_chat"}
    lm, tokenizer, spec = log[0].user, log[0].tokenizer, log[0].spec
    agents = Agents.build(lm, lm, tokenizer, load_prompts("en", tmp_path), spec, **own)
    (one,) = transcripts(1)
    example = user_examples(agents).example(dataclasses.replace(one, record=one.record | told))
    assert wanted in tokenizer.decode(example.tokens.tolist())


def test_texts_alone_make_the_tokens_of_the_log_again(log):
    """A log whose tokens are taken away: texts are encoded, as if the user had written them."""
    agents, _ = log
    make, generous = user_examples(agents), user_examples(agents, field_tokens=50, reply_tokens=50)
    for one in transcripts():
        complete, cut = generous.example(one), make.example(one)
        assert complete.changes.tolist() == [m["change"] for m in one.record["messages"][2::2]]
        text = agents.tokenizer.decode(complete.tokens[complete.branch == 0].tolist())
        for message in one.record["messages"][:-2]:
            assert (message["content"] or "") in text
        assert len(cut) <= len(complete)
        lengths = {}
        for name, example in (("cut", cut), ("exact", complete)):
            targets = example.field == make.fields.index("content")
            lengths[name] = np.diff(np.flatnonzero(np.diff(example.at[targets], prepend=-9, append=10**6) > 1))
        assert lengths["cut"].max() <= 12, "as play cuts a field"
        ends = agents.tokenizer.encode("\n")[0]
        stops = [(example.target[example.field == 0] == ends).sum() for example in (cut, complete)]
        assert stops[1] == len(complete.changes), "every field ends its line"


def test_a_turn_without_a_field_is_not_learned_and_later_turns_are_the_same(log):
    agents, _ = log
    make = user_examples(agents, field_tokens=40, reply_tokens=40)
    one = transcripts(3)[2]
    whole, record = make.example(one), one.record
    messages = [dict(m) for m in record["messages"]]
    messages[2]["appraisal"] = {"content": messages[2]["appraisal"]["content"]}
    without = make.example(dataclasses.replace(one, record=record | {"messages": messages}))
    assert make.left_out == {"turns without the field 'feeling' of the appraisal script": 1}
    plain = lambda example: example.tokens[example.branch == 0].tolist()  # noqa: E731
    assert plain(without) == plain(whole)
    turn = lambda example, t: example.branch // BRANCH_RADIX == t  # noqa: E731
    assert not turn(without, 1).any()
    for t in (2, 3):
        for name in ("tokens", "positions", "branch"):
            a, b = (getattr(example, name)[turn(example, t)] for example in (without, whole))
            np.testing.assert_array_equal(a, b)
    assert len(without.changes) == len(whole.changes) - 1
    assert without.replies.tolist() == whole.replies.tolist()[1:], "the first reply's change is not there"
    assert without.emotions.tolist() == whole.emotions.tolist()[1:]
    messages[2]["appraisal"], messages[2]["considerations"] = record["messages"][2]["appraisal"], {}
    unsaid = make.example(dataclasses.replace(one, record=record | {"messages": messages}))
    assert plain(unsaid) == plain(whole)
    assert unsaid.changes.tolist() == whole.changes.tolist()
    assert (unsaid.field == make.fields.index("reply")).sum() < (whole.field == make.fields.index("reply")).sum()


def test_turns_that_the_context_has_no_room_for_are_left_out(log):
    agents, _ = log
    one = transcripts(6)[5]
    whole = user_examples(agents, field_tokens=40, reply_tokens=40).example(one)
    assert len(whole.changes) == 3
    second = whole.positions[whole.branch // BRANCH_RADIX == 2].max() + 1
    small = dataclasses.replace(agents, spec=dataclasses.replace(agents.spec, context=int(second)))
    make = user_examples(small, field_tokens=40, reply_tokens=40)
    example = make.example(one)
    assert make.left_out == {"turns beyond rollout.context": 1}
    assert example.changes.tolist() == whole.changes[:2].tolist()
    np.testing.assert_array_equal(example.tokens, whole.tokens[: len(example)])


def test_what_a_policy_learns_is_chosen_by_turn(log):
    agents, _ = log
    one = transcripts(3)[2]
    assert [m["change"] for m in one.record["messages"][2::2]] == [0, 10, 7]
    every = PolicyExamples(agents, min_change=-10, say_tokens=20).example(one)
    make = PolicyExamples(agents, min_change=8, say_tokens=20)
    good = make.example(one)
    assert make.left_out == {"replies below sft.min_change": 2}
    assert set((good.branch // BRANCH_RADIX).tolist()) == {0, 2}
    assert good.tokens[good.branch == 0].tolist() == every.tokens[every.branch == 0].tolist()
    assert PolicyExamples(agents, min_change=10, say_tokens=20).example(transcripts(2)[1]) is None, "nothing to learn"
    messages = [dict(m) for m in one.record["messages"]]
    messages[1]["thought"], messages[3]["violation"] = None, True
    make = PolicyExamples(agents, min_change=-10, say_tokens=20)
    make.example(dataclasses.replace(one, record=one.record | {"messages": messages}))
    assert make.left_out == {"replies without a thought": 1, "replies that broke the format": 1}


def test_each_dialogue_is_learned_in_its_own_mode(log):
    """As by the examples of that mode alone; a log of SAGE's files says by its thoughts which one it is."""
    agents, (one, *_) = log
    direct = Agents.build(
        agents.policy, agents.user, agents.tokenizer, agents.prompts, dataclasses.replace(agents.spec, mode="direct"),
        style=agents.style, scenario=agents.scenario,
    )  # fmt: skip
    limits = {"min_change": -10, "say_tokens": 20}
    both = LoggedModeExamples({"think": agents, "direct": direct}, **limits)
    for mode, of_mode in (("think", agents), ("direct", direct)):
        alone, told = PolicyExamples(of_mode, **limits), dataclasses.replace(one, record=one.record | {"mode": mode})
        wanted, actual = alone.example(told), both.example(told)
        names = [[make.fields[i] for i in example.field] for make, example in ((alone, wanted), (both, actual))]
        assert names[0] == names[1]
        for name in ("tokens", "positions", "branch", "at", "target"):
            np.testing.assert_array_equal(getattr(actual, name), getattr(wanted, name))
        assert set(names[0]) == ({"thought", "reply"} if mode == "think" else {"reply"})


@pytest.mark.parametrize("mode", ["think", "direct"])
def test_replies_are_what_apply_chat_template_gives(log, mode, tmp_path):
    """With Qwen3's template: each reply ends the conversation up to it, its thought, or an empty one, before it."""
    folder = write_qwen3(tmp_path)
    tokenizer, reference = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    spec = dataclasses.replace(log[0].spec, mode=mode, think_tokens=90, say_tokens=60)
    options = {"style": log[0].style, "scenario": log[0].scenario}
    agents = Agents.build(log[0].policy, log[0].user, tokenizer, log[0].prompts, spec, **options)
    make = PolicyExamples(agents, min_change=-10, say_tokens=60)
    for one in transcripts():
        example, messages = make.example(one), one.record["messages"]
        conversation = [{"role": "system", "content": SHORT_PROMPTS[f"policy_{mode}.j2"]}]
        for turn, (heard, reply) in enumerate(zip(messages[::2], messages[1::2], strict=False)):
            conversation += [
                {"role": "user", "content": heard["content"]},
                {"role": "assistant", "content": reply["content"]},
            ]
            conversation[-1]["reasoning_content"] = reply["thought"] if mode == "think" else None
            want = reference.apply_chat_template(conversation, tokenize=True, return_dict=False)
            own = (turn + 1) * BRANCH_RADIX
            last = np.flatnonzero(example.branch == own)[-1]
            tokens = example.tokens[: last + 1][np.isin(example.branch[: last + 1], (0, own))]
            end = example.target[example.at == last].tolist()
            assert [*tokens.tolist(), *end, *tokenizer.encode("\n")] == want
            assert end == [tokenizer.im_end_id]
    assert not make.left_out


def test_a_text_becomes_one_line():
    assert as_line("a\n\n b  c\r\n") == "a b c"
    assert as_line("心理活动]\n王小云感到\n失望。") == "王小云感到 失望。", "SAGE's fields begin with a heading's rest"
    assert as_line("[b]\nc") == "[b] c"
    assert as_line("over]") == "over]"
    assert as_line(" \n ") == ""


@pytest.mark.parametrize("language", LANGUAGES)
def test_prompts_without_some_fields_are_those_that_are_written(tmp_path, language):
    own = tmp_path / "own"
    own.mkdir()
    (own / "opening.txt").write_text("Begin.")
    for folder in ("", str(own)):
        prompts = load_prompts(language, folder or None)
        known = free_fields(prompts.appraisal), free_fields(prompts.reply)
        for appraisal, reply in (((), ()), (known[0][1:3], known[1][1:2]), (known[0], known[1])):
            short = with_fields(prompts, appraisal.__contains__, reply.__contains__)
            assert free_fields(short.appraisal) == list(appraisal)
            assert free_fields(short.reply) == [*(name for name in reply if name != "reply"), "reply"]
            assert {part.value for part in short.appraisal if part.kind == "slot"} == {"emotion", "band"}
            assert short.appraisal[-1] == prompts.appraisal[-1]
            new = tmp_path / f"new{len(folder)}_{len(appraisal)}"
            write_prompts(short, folder, new)
            again = load_prompts(language, new)
            assert (again.appraisal, again.reply, again.opening) == (short.appraisal, short.reply, prompts.opening)
        assert (again.appraisal, again.reply) == (prompts.appraisal, prompts.reply)


def test_a_user_without_an_appraisal_learns_its_change_alone(log, prompts):
    agents, dialogues = log
    told = {"style": agents.style, "scenario": agents.scenario}
    nothing = with_fields(prompts, lambda name: False, lambda name: True)
    short = Agents.build(agents.policy, agents.user, agents.tokenizer, nothing, agents.spec, **told)
    make = user_examples(short)
    assert make.fields == ["change", "tone", "reply"]
    assert not make.teaches_appraisal
    example = make.example(dialogues[0])
    spelt = agents.tokenizer.decode(example.tokens.tolist())
    assert "Heard:" not in spelt
    assert "Change:\n" in spelt


def test_saved_records_are_read_again(tmp_path, log):
    """Through a file, as the command reads them."""
    from rlver_jax.dialogues.log import write_dialogues

    agents, dialogues = log
    write_dialogues(tmp_path / "log.jsonl", [one.record for one in dialogues])
    make = user_examples(agents)
    for mine, restored in zip(dialogues, read_finished(tmp_path / "log.jsonl"), strict=True):
        a, b = (make.example(dataclasses.replace(one, profile=mine.profile)) for one in (mine, restored))
        for field in dataclasses.fields(a):
            np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))
