"""Putting two sides together: what belongs together, what fits, and what is padding."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import get_config
from rlver_jax.decoding.cache import LM
from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.hf_weights import save_params
from rlver_jax.models.qwen import Qwen2, init_params
from rlver_jax.rollout.agents import Agents, check_tokenizers, limits_of, load_model, spec_of
from rlver_jax.rollout.spec import RolloutConfig
from rlver_jax.text.template import FolderTemplate
from rlver_jax.text.tokenizer import HFTokenizer
from rlver_jax.user.prompts import load_prompts
from tests.conftest import SHORT_PROMPTS, Fresh, Row, check_claims, make_profiles
from tests.text.conftest import ADDED, THINK, write_bpe

SPEC = RolloutConfig("direct", False, 2, 3, 704, 24, 16, 16)
HOW = {"style": "vanilla", "scenario": "heart_to_heart"}


@pytest.fixture(scope="module")
def agents(policy_lm, user_lm, bpe, prompts) -> Agents:
    return Agents.build(policy_lm, user_lm, bpe, prompts, SPEC, **HOW)


@pytest.fixture(scope="module")
def folder(policy_lm, bpe, tmp_path_factory):
    """The policy as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("hf")
    save_params(folder, policy_lm.params, policy_lm.model.config)
    bpe.save(folder)
    return folder


def config_of(policy, user):
    config = get_config()
    for side, path in ((config.policy, policy), (config.user, user)):
        side.path, side.scan_layers, side.dtype, side.param_dtype = str(path), False, "float32", "float32"
    config.rollout.context, config.rollout.say_tokens, config.rollout.think_tokens = 1024, 40, 50
    config.user.reply_tokens, config.user.field_tokens = 33, 21
    return config


def test_encode_pads_profiles_and_rows(agents, bpe):
    """Prefix, cue, first talk and padding, against the texts."""
    profiles = make_profiles(3)
    encoded = agents.encode(profiles, [7, 8, 20, 21, 5, 6], count=4)
    assert encoded.prefix.shape[0] == 4
    assert encoded.prefix.shape[1] % 128 == 0
    assert encoded.active.tolist() == [True] * 6 + [False] * 2
    assert encoded.dialogue_ids.tolist() == [7, 8, 20, 21, 5, 6, 0, 0]
    for i, p in enumerate(profiles):
        tokens = encoded.prefix[i, : encoded.prefix_count[i]].tolist()
        system = f"{p.persona}\n{p.scene}\n{p.hidden_intention}"
        starts = [k for k, t in enumerate(tokens) if t == bpe.im_start_id]
        texts = [bpe.decode(tokens[a:b]) for a, b in zip(starts, [*starts[1:], None], strict=True)]
        assert texts == [f"system\n{system}\n", "user\nGo.\n", "assistant\n"]
        assert bpe.decode(encoded.first_talk[i, : encoded.first_count[i]].tolist()) == (p.first_talk or "")
    assert encoded.prefix_count[3] == encoded.first_count[3] == 0


def test_wrong_numbers_of_ids_are_refused(agents):
    with pytest.raises(ValueError, match="3 dialogue ids for 2 profiles in groups of 2"):
        agents.encode(make_profiles(2), [1, 2, 3])


def test_a_profile_without_room_is_refused_by_name(agents):
    long = dataclasses.replace(make_profiles(3)[1], id="the-long-one", persona="felt awful " * 150)
    with pytest.raises(
        ValueError, match=r"of profile the-long-one take \d+ tokens, .* rollout.context is 704; raise it"
    ):
        agents.encode([*make_profiles(2), long], range(6))
    wider = Agents.build(
        agents.policy, agents.user, agents.tokenizer, agents.prompts, dataclasses.replace(SPEC, context=1500), **HOW
    )
    assert wider.encode([*make_profiles(2), long], range(6)).prefix_count.max() > 300


def test_a_policy_without_room_is_refused(agents):
    spec = dataclasses.replace(SPEC, say_tokens=500)
    tight = Agents.build(agents.policy, agents.user, agents.tokenizer, agents.prompts, spec, **HOW)
    with pytest.raises(ValueError, match="policy's system prompt takes .* raise it to"):
        tight.encode(make_profiles(1), [0, 1])


def test_more_turns_than_compiled_are_refused(agents):
    config = config_of("", "")
    limits = dataclasses.replace(limits_of(config, SPEC, 1.0), max_turns=jnp.int32(4))
    with pytest.raises(ValueError, match="limits.max_turns=.* compiled for at most 3"):
        agents.check_limits(limits)


def test_two_tokenizers_are_refused(bpe, tmp_path):
    other = HFTokenizer(write_bpe(tmp_path, [*ADDED, *THINK]))
    number = bpe.vocab_size
    with pytest.raises(
        ValueError, match=f"token id {number} is no token .* '<think>' .* choose two models of one family"
    ):
        check_tokenizers(bpe, other)
    check_tokenizers(bpe, bpe)


def test_two_folders_with_different_tokenizers_are_refused(folder, policy_lm, tmp_path):
    save_params(tmp_path, policy_lm.params, policy_lm.model.config)
    write_bpe(tmp_path, [*ADDED, *THINK])
    config = config_of(folder, tmp_path)
    spec = spec_of(config, group=1, max_turns=2, initial_emotion=30)
    with pytest.raises(ValueError, match="different tokenizers"):
        Agents.load(config, spec)


@pytest.mark.parametrize("side", ["policy", "user"])
def test_one_more_special_token_is_no_other_tokenizer(bpe, tmp_path, side):
    """`[PAD]` beside a model whose embedding has a row for it, the other's none: neither ever says it."""
    net = Qwen2Config(bpe.vocab_size, 32, 64, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16)
    for name, rows in (("fewer", bpe.vocab_size), ("more", bpe.vocab_size + 1)):
        model = Qwen2(dataclasses.replace(net, vocab_size=rows), scan_layers=False)
        save_params(tmp_path / name, init_params(model, jax.random.key(0)), model.config)
        write_bpe(tmp_path / name, [*ADDED, "[PAD]"] if name == "more" else ADDED)
    paths = {"policy": "fewer", "user": "fewer"} | {side: "more"}
    config = config_of(*(tmp_path / paths[name] for name in ("policy", "user")))
    agents = Agents.load(config, spec_of(config, group=1, max_turns=2, initial_emotion=30))
    policy, user = agents.tables
    for name, grammar in (("policy", policy.grammar), ("user", user.grammar)):
        forbidden = np.asarray(grammar.forbidden)
        assert forbidden.shape[1] == bpe.vocab_size + (name == side)
        assert forbidden[:, bpe.vocab_size :].all()
    assert agents.tokenizer.encode("felt awful") == bpe.encode("felt awful")


def test_one_folder_for_both_sides_is_loaded_once(folder, policy_lm):
    config = config_of(folder, folder)
    spec = spec_of(config, group=4, max_turns=2, initial_emotion=35)
    agents = Agents.load(config, spec)
    assert agents.policy is agents.user
    jax.tree.map(np.testing.assert_array_equal, agents.policy.params, policy_lm.params)
    assert (spec.mode, spec.group, spec.max_turns, spec.context, spec.rules.initial) == ("think", 4, 2, 1024, 35)
    assert (spec.think_tokens, spec.say_tokens, spec.user_tokens, spec.policy_tokens) == (50, 40, 33, 90)
    limits = limits_of(config, spec, 0.5)
    assert (int(limits.user.field_tokens), int(limits.user.reply_tokens)) == (21, 33)
    assert float(limits.temperature) == 0.5
    config.user.dtype = "bfloat16"
    other = Agents.load(config, spec)
    assert other.user.model.dtype == jnp.bfloat16
    assert other.policy.model.dtype == jnp.float32


def test_another_familys_template_is_refused_before_the_weights_are_read(folder, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    text = "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(text)
    config = config_of(tmp_path, tmp_path)
    with pytest.raises(ValueError, match=r"chat_template\.jinja: the chat template is not ChatML, but Mistral's"):
        load_model(config.policy, "policy")


def test_an_empty_path_is_refused():
    with pytest.raises(ValueError, match="user.path is empty; set --config.user.path"):
        load_model(get_config().user, "user")


@pytest.mark.slow
def test_sides_of_different_dtypes_play(agents, bpe):
    """A bfloat16 user beside a float32 policy: whole dialogues, log-probabilities as far as bfloat16 goes."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), agents.user.params)
    user = LM(half, dataclasses.replace(agents.user.model, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    mixed = Agents.build(agents.policy, user, bpe, agents.prompts, SPEC, **HOW)
    profiles = make_profiles(2)
    config = config_of("", "")
    config.rollout.think_tokens = config.rollout.say_tokens = 16
    config.user.field_tokens = config.user.reply_tokens = 16
    played = mixed.play(mixed.encode(profiles, range(4)), jax.random.key(2), limits_of(config, SPEC, 1.0))
    d, fresh = jax.device_get(played), Fresh(bpe, False, 9, 100)
    assert (d.end_reason > 0).all()
    for b in range(4):
        check_claims(agents.policy, fresh.policy_rows(d, b))
        check_claims(user, fresh.user_rows(d, b, profiles[b // 2], 3), atol=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("text", [None, "Be brief."])
def test_without_a_prompt_of_ours_the_folders_template_speaks(policy_lm, user_lm, bpe, tmp_path, text):
    """An empty prompt file: no system message of ours, so the one that the folder's template begins with, if any."""
    for name, prompt in (SHORT_PROMPTS | {"policy_direct.j2": ""}).items():
        (tmp_path / name).write_text(prompt, encoding="utf-8")
    each = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    start = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    system = f"<|im_start|>system\n{text}<|im_end|>\n"
    check = f"{{% if messages[0].role != 'system' %}}{{{{ {system!r} }}}}{{% endif %}}" if text else ""
    tokenizer = copy.copy(bpe)
    tokenizer.template = FolderTemplate(check + each + start, "here")
    tokenizer.template.check()
    agents = Agents.build(policy_lm, user_lm, tokenizer, load_prompts("en", tmp_path), SPEC, **HOW)
    system = np.asarray(agents.tables[0].system).tolist()
    assert bpe.decode(system) == (f"system\n{text}\n" if text else "")
    config = config_of("", "")
    config.rollout.say_tokens = config.user.field_tokens = config.user.reply_tokens = 16
    profiles = make_profiles(2)
    played = agents.play(agents.encode(profiles, range(4)), jax.random.key(2), limits_of(config, SPEC, 1.0))
    d, fresh = jax.device_get(played), Fresh(bpe, False, 9, 100)
    assert (d.end_reason > 0).all()
    ours = len(fresh.chat.message("system", SHORT_PROMPTS["policy_direct.j2"]))
    shift = len(system) - ours
    for b in range(4):  # contexts put together anew, with this beginning in place of ours
        rows = [
            Row(system + row.ids[ours:], [(position + shift, token, value) for position, token, value in row.claims])
            for row in fresh.policy_rows(d, b)
        ]
        assert check_claims(policy_lm, rows) > 0
