"""The two agents, ready to play: models, one tokenizer, prompts, and profiles in tokens."""

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key
from ml_collections import ConfigDict

from rlver_jax.config.sections import keywords
from rlver_jax.decoding.cache import LM
from rlver_jax.decoding.generate import Truncation
from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.hf_weights import load_params
from rlver_jax.models.lora import join, split
from rlver_jax.models.peft_files import with_adapter
from rlver_jax.models.quantization import quantize, unrounded
from rlver_jax.models.qwen import Params, Qwen2, init_params
from rlver_jax.parallel.distributed import replicate
from rlver_jax.profiles.schema import Profile
from rlver_jax.rollout.policy_turn import PolicyTables, build_policy_tables
from rlver_jax.rollout.profile_tokens import EncodedProfile, ProfileTokens, measure_profiles
from rlver_jax.rollout.ready import fitted_adapter
from rlver_jax.rollout.sampler import Dialogues, Profiles, room_needed, sample_dialogues
from rlver_jax.rollout.spec import RolloutConfig, RolloutLimits, check_context
from rlver_jax.text.chat import ChatTemplate
from rlver_jax.text.common import difference
from rlver_jax.text.tokenizer import Tokenizer, load_tokenizer
from rlver_jax.user.emotion import EmotionRules
from rlver_jax.user.prompts import Prompts, load_prompts
from rlver_jax.user.turn import UserLimits, UserTables, build_user_tables

_T = TypeVar("_T")
# Fields that a model's parameters depend on.
_OF_PARAMETERS = ("path", "adapter", "size", "init", "dtype", "param_dtype", "scan_layers")
Weights = Callable[[Qwen2, Mesh | None], Params]  # where a model's parameters come from


def check_tokenizers(policy: Tokenizer, user: Tokenizer) -> None:
    """Refuses two tokenizers that are not one: dialogues pass between the models as token ids.

    Raises:
        ValueError: an id of text means something else in the other, or they split text in two ways; see `difference`.
    """
    if (reason := difference(policy, user)) is not None:
        raise ValueError(
            f"policy and user have different tokenizers ({policy.vocab_size} and {user.vocab_size} tokens), but they "
            f"exchange token ids: {reason}; choose two models of one family, e.g. two sizes of Qwen2.5, or of Qwen3"
        )


def tokenizers_differ(config: ConfigDict) -> bool:
    """Whether policy and user on the device have two tokenizers, so that they can exchange text alone.

    Raises:
        ValueError, OSError: a folder holds no tokenizer that can be used.
    """
    paths = [config[name].path for name in ("policy", "user")]
    if not all(paths) or paths[0] == paths[1]:  # where none is named the loader says so
        return False
    return difference(*map(load_tokenizer, paths)) is not None


def make_model(config: ConfigDict, name: str, architecture: Qwen2Config | None = None) -> Qwen2:
    """The module of `config.policy`, `config.user` or `config.critic`, without weights, as it plays.

    Args:
        architecture: instead of that of config.path.

    Raises:
        ValueError: no path is set, or its config.json is not a Qwen2.5 or Qwen3 model's.
    """
    if not config.path and architecture is None:
        raise ValueError(
            f"{name}.path is empty; set --config.{name}.path to a Hugging Face folder of a Qwen2.5 or Qwen3 model"
        )
    return Qwen2(
        architecture or Qwen2Config.from_hf(config.path),
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        scan_layers=config.scan_layers,
        attention="chunked" if config.attention == "splash" else config.attention,  # splash is for training alone
        attention_chunk=config.attention_chunk,
    )


def load_model(
    config: ConfigDict, name: str, mesh: Mesh | None = None, weights: Weights | None = None
) -> tuple[LM, Tokenizer]:
    """Model and tokenizer of `config.policy`, `config.user` or `config.critic`; random weights differ by `name`.

    Args:
        weights: where the parameters come from instead of `config.path`.

    Raises:
        ValueError: no path is set, or what it holds is not a Qwen2.5 or Qwen3 model (see `hf_weights`).
    """
    model = make_model(config, name)
    tokenizer = load_tokenizer(config.path)  # first: a bad one is refused before the weights are read
    rounded = model.param_dtype == jnp.int8
    stored = unrounded(model) if rounded else model
    if weights is not None:
        params = weights(stored, mesh)
    elif config.init == "random":
        params = random_params(stored, name, mesh)
    else:
        params = read_params(config, stored, mesh)
    return LM(quantize(params, model, mesh) if rounded else params, model), tokenizer


def read_params(config: ConfigDict, model: Qwen2, mesh: Mesh | None = None) -> Params:
    """Weights of the folder `config.path`, with the adapter `config.adapter` merged into them, if there is one."""
    params = load_params(config.path, model, mesh=mesh)
    return with_adapter(params, model, config.adapter, mesh) if config.adapter else params


def same_parameters(one: ConfigDict, other: ConfigDict, but: str = "") -> bool:
    """Whether two models of a config are of one folder and read in one way, so that one copy serves both.

    but: a field in which they may differ.
    """
    return all(one[name] == other[name] for name in _OF_PARAMETERS if name != but)


def stands_on_base(config: ConfigDict) -> bool:
    """Whether the user is an adapter on the policy's frozen base, which stays one copy: it isn't merged."""
    one = same_parameters(config.policy, config.user, but="adapter")
    return bool(config.lora.rank and config.user.adapter and not config.policy.adapter and one)


def _as_read(base: ConfigDict, policy: ConfigDict) -> ConfigDict:
    """The weights of one section in the precision and layout of another, in which they have been read."""
    section = policy.copy_and_resolve_references()
    section.path, section.adapter, section.init, section.size = base.path, base.adapter, base.init, base.size
    return section


def random_params(model: Qwen2, name: str, mesh: Mesh | None = None) -> Params:
    """Random weights of the model of `config.NAME`; always the same ones."""
    return init_params(model, jax.random.key(zlib.crc32(name.encode())), mesh)


def emotion_rules(config: ConfigDict, initial: int) -> EmotionRules:
    """The emotion's rules of a config, starting from `initial`."""
    fields = keywords(EmotionRules, config.emotion) | {
        "initial": initial,
        "thresholds": tuple(config.emotion.thresholds),
    }
    return EmotionRules(**fields)


def spec_of(config: ConfigDict, *, group: int, max_turns: int, initial_emotion: int, rows: int = 0) -> RolloutConfig:
    """What the sampler is compiled for, from a config."""
    return RolloutConfig(
        **keywords(RolloutConfig, config.policy, config.user, config.rollout)
        | {"group": group, "max_turns": max_turns, "rows": rows},
        user_tokens=max(config.user.field_tokens, config.user.reply_tokens),
        rules=emotion_rules(config, initial_emotion),
        truncation=Truncation(config.rollout.top_k, config.rollout.top_p),
    )


def limits_of(config: ConfigDict, spec: RolloutConfig, temperature: float) -> RolloutLimits:
    """The lengths and temperatures of a config, as arguments of the sampler."""
    return RolloutLimits(
        max_turns=jnp.int32(spec.max_turns),
        think_tokens=jnp.int32(config.rollout.think_tokens),
        say_tokens=jnp.int32(config.rollout.say_tokens),
        temperature=jnp.float32(temperature),
        initial_emotion=jnp.int32(spec.rules.initial),
        user=UserLimits(
            jnp.int32(config.user.field_tokens),
            jnp.int32(config.user.reply_tokens),
            jnp.float32(config.user.reply_temperature),
        ),
    )


@dataclasses.dataclass(frozen=True)
class Agents:
    """Two models with one tokenizer, and everything that is compiled or looked up for them."""

    policy: LM
    user: LM
    tokenizer: Tokenizer
    prompts: Prompts
    tables: tuple[PolicyTables, UserTables]
    style: str
    scenario: str
    spec: RolloutConfig
    mesh: Mesh | None = None  # that dialogues are played on

    @classmethod
    def build(
        cls,
        policy: LM,
        user: LM,
        tokenizer: Tokenizer,
        prompts: Prompts,
        spec: RolloutConfig,
        mesh: Mesh | None = None,
        user_tokenizer: Tokenizer | None = None,
        *,
        style: str,
        scenario: str,
    ) -> "Agents":
        """Agents from loaded models.

        Args:
            style, scenario: of the user's prompts.
            user_tokenizer: the user's own; it may lack special tokens of the policy's, or have more of them.
        """
        tables = (
            build_policy_tables(tokenizer, prompts, policy.model.config.vocab_size, spec),
            build_user_tables(user_tokenizer or tokenizer, prompts, user.model.config.vocab_size),
        )
        agents = cls(policy, user, tokenizer, prompts, tables, style=style, scenario=scenario, spec=spec, mesh=mesh)
        return dataclasses.replace(agents, tables=agents.replicate(tables))

    @classmethod
    def load(
        cls,
        config: ConfigDict,
        spec: RolloutConfig,
        mesh: Mesh | None = None,
        policy_weights: Weights | None = None,
        rest: Mesh | None = None,
        load: Callable[..., tuple[LM, Tokenizer]] = load_model,
        adapt: Callable[..., Params] = fitted_adapter,
        policy_base: ConfigDict | None = None,
    ) -> "Agents":
        """Agents of a config; `policy_weights` replace those of policy.path. One folder for both is loaded once.

        Args:
            policy_base: `config.policy` of the model whose weights `policy_weights` give with an adapter beside them.
            mesh: that dialogues are played on; both models are loaded onto it.
            rest: that they are loaded onto instead, for training; `sampling_copy` brings them over.
            load, adapt: of each model, and of the user's adapter on the policy's base; a plan's make shapes.

        Raises:
            ValueError: the two models have different tokenizers, one of them cannot be loaded, or reads fewer tokens
                than rollout.context.
        """
        check_context(config, "policy", "user")
        policy, tokenizer = load(config.policy, "policy", rest or mesh, policy_weights)
        if policy_weights is not None:
            one = policy_base is not None and same_parameters(_as_read(policy_base, config.policy), config.user)
        else:
            one = same_parameters(config.policy, config.user) or stands_on_base(config)
        if config.user.init == "path" and one:
            own = {name: config.user[name] for name in ("attention", "attention_chunk")}
            model, params, other = policy.model.clone(**own), policy.params, tokenizer
            if policy_weights is not None:
                params = split(params)[0]
            elif stands_on_base(config):
                params = join(params, adapt(config.user.adapter, model, mesh))
            user = policy if params is policy.params and model == policy.model else LM(params, model)
        else:
            user, other = load(config.user, "user", rest or mesh)
        check_tokenizers(tokenizer, other)
        prompts = load_prompts(config.data.language, config.user.prompts or None)
        told = {"style": config.user.style, "scenario": config.user.scenario}
        return cls.build(policy, user, tokenizer, prompts, spec, mesh, other, **told)

    def prefix(self, profile: Profile) -> list[int]:
        """What the user reads before the first turn: its system prompt, the cue, the opening of its message."""
        told = {"style": self.style, "scenario": self.scenario}
        messages = self.prompts.before_first_turn(profile, **told, rules=self.spec.rules)
        return ChatTemplate(self.tokenizer).conversation(messages, generation_prompt=True)

    def tokens(self, profiles: Sequence[Profile]) -> ProfileTokens:
        """Profiles in tokens.

        Raises:
            ValueError: a profile leaves no room for a turn in the context.
        """
        tokens, longest, length = measure_profiles(profiles, self._encoded, self._context())
        self._check_room(longest, length, tokens.first_width)
        return tokens

    def _context(self) -> list[str]:
        """All that decides the tokens of a profile: tokenizer, prompts as they are written, and a user's own files."""
        wishes = [name for known in self.prompts.intentions.values() for name in (known.sentence, *known.aliases)]
        probes = [self.prefix(Profile("", "persona", "scene", wish, "")) for wish in (*wishes, "wish")]
        files = [Path(file) for _, file in sorted(self.prompts.origins.items())]
        own = [file.read_text(encoding="utf-8") for file in files if file.is_file()]  # ours are named, not located
        return [self.tokenizer.fingerprint, self.style, self.scenario, repr(self.spec.rules), repr(probes), *own]

    def _encoded(self, profile: Profile) -> EncodedProfile:
        talk = self.tokenizer.encode(profile.first_talk.strip()) if profile.first_talk else []
        return EncodedProfile(np.array(self.prefix(profile), np.int32), np.array(talk, np.int32))

    def encode(self, profiles: Sequence[Profile], dialogue_ids: Sequence[int], count: int | None = None) -> Profiles:
        """A batch of these profiles alone; see `ProfileTokens.batch`."""
        group = self.spec.group
        if len(dialogue_ids) != len(profiles) * group:
            raise ValueError(f"{len(dialogue_ids)} dialogue ids for {len(profiles)} profiles in groups of {group}")
        return self.tokens(profiles).batch(range(len(profiles)), dialogue_ids, count, self.mesh)

    def _check_room(self, longest: Profile, length: int, first_width: int) -> None:
        limits = UserLimits(self.spec.user_tokens, self.spec.user_tokens, 0.0)  # type: ignore[arg-type]
        full = RolloutLimits(0, 0, 0, 0.0, 0, limits)  # type: ignore[arg-type]
        policy_room, room = room_needed(self.tables, self.spec, full, first_width)
        system = self.tables[0].system.shape[0]
        if system + policy_room > self.spec.context:
            raise ValueError(
                f"the policy's system prompt takes {system} tokens and a turn may take {policy_room} more, but "
                f"rollout.context is {self.spec.context}; raise it to {system + policy_room} for one turn at least"
            )
        if length + room > self.spec.context:
            raise ValueError(
                f"prompt and first words of profile {longest.id} take {length} tokens, and a turn may take {room} "
                f"more, but rollout.context is {self.spec.context}; raise it to {length + room} for one turn at least"
            )

    def play(self, profiles: Profiles, key: Key[Array, ""], limits: RolloutLimits) -> Dialogues:
        """Plays a batch; see `sampler.sample_dialogues`. The limits must have passed `check_limits`."""
        key, limits = self.replicate((key, limits))
        with self.on_mesh():
            return sample_dialogues(self.policy, self.user, self.tables, profiles, key, limits, spec=self.spec)

    def on_mesh(self) -> contextlib.AbstractContextManager:
        """Within it the mesh, if there is one, is this thread's: a thread begins with none."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def replicate(self, tree: _T) -> _T:
        """Small arrays, whole on every device of the mesh."""
        return tree if self.mesh is None else replicate(tree, self.mesh)

    def check_limits(self, limits: RolloutLimits) -> RolloutLimits:
        """The limits, if they are none above what the sampler is compiled for.

        Raises:
            ValueError: one is.
        """
        spec, user = self.spec, limits.user
        for name, limit, most in (
            ("max_turns", limits.max_turns, spec.max_turns),
            ("think_tokens", limits.think_tokens, spec.think_tokens),
            ("say_tokens", limits.say_tokens, spec.say_tokens),
            ("user.field_tokens", user.field_tokens, spec.user_tokens),
            ("user.reply_tokens", user.reply_tokens, spec.user_tokens),
        ):
            if int(limit) > most:
                raise ValueError(f"limits.{name}={limit}, but the sampler is compiled for at most {most}")
        return limits
