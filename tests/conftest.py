"""Shared fixtures. Eight fake CPU devices are made before JAX starts, so that every test can build a mesh.

Also the agents of the dialogue tests: two tiny models, trained by `make_tiny_models.py`, that write think-then-say
replies and short lines, and `Fresh`, which assembles contexts from logged ids by plain concatenation (no cache).
"""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # this run's processes, workers included, compile a program once
    _COMPILED = tempfile.TemporaryDirectory(prefix="rlver_jax_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import dataclasses
import functools
import gc
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from configs.debug import WORLD
from rlver_jax.decoding.cache import LM, append, init_cache
from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.hf_weights import save_params
from rlver_jax.models.qwen import Qwen2, abstract_params, logits
from rlver_jax.profiles.schema import Profile
from rlver_jax.text.chat import ChatTemplate
from rlver_jax.text.tokenizer import HFTokenizer, SentencePieceTokenizer, train_sentencepiece
from rlver_jax.user.prompts import load_prompts
from tests.quick import QUICK, free_programs
from tests.text.conftest import sentences, write_bpe

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden"
TINY = {
    "policy": {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2},
    "user": {"hidden_size": 48, "intermediate_size": 96, "num_layers": 1, "num_heads": 3, "num_kv_heads": 1},
}
TINY["policy"] |= {"tie_embeddings": True}


# Modules of the default tests that take longest, the longest first: a worker that began one last would keep the others.
LONGEST = (
    "test_loop", "test_verify_policy", "test_forged_logs", "test_two_tokenizers", "test_overlap", "test_sampler",
    "test_qwen", "test_sources", "test_remote_users", "test_verify", "test_forged_training_logs", "test_kill",
    "test_refill", "test_sft", "test_sft_loss", "test_rounds", "test_evaluate", "test_train_step", "test_sequences",
    "test_bench", "test_public_api", "test_debug", "test_programs", "test_packing", "test_console", "test_serve",
    "test_server", "test_engine", "test_checkpoints", "test_hostile", "test_lock", "test_generate", "test_precision",
    "test_chat_templates",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Default tests spend their time compiling small programs, slow ones running them."""
    if "not slow" in config.option.markexpr:
        os.environ["XLA_FLAGS"] += f" {QUICK}"  # read when the first array is made
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # pytest-xdist keeps the order made below


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest modules first."""
    order = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    """JAX keeps millions of small objects: to look through them all over and over took a tenth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="module", autouse=True)
def _free_programs():
    """Between modules, so that one worker can run all tests; a module makes fewer than 5,000 maps.

    Not after each: what several modules use is traced and compiled once. 16,000 maps are about 2.5 GB.
    """
    yield
    free_programs(most_maps=16_000)


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """Folder of the real Qwen2.5-0.5B checkpoint, named by RLVER_JAX_CHECKPOINT."""
    folder = os.environ.get("RLVER_JAX_CHECKPOINT", "")
    if not folder or not (Path(folder) / "model.safetensors").exists():
        pytest.skip("no real checkpoint: set RLVER_JAX_CHECKPOINT to a Qwen2.5-0.5B folder")
    return Path(folder)


@pytest.fixture(scope="session")
def published() -> Path:
    """Folder of RLVER's published profiles, named by RLVER_JAX_PROFILES."""
    folder = os.environ.get("RLVER_JAX_PROFILES", "")
    if not folder or not (Path(folder) / "train_profile.jsonl").exists():
        pytest.skip("no published profiles: set RLVER_JAX_PROFILES to a folder with RLVER's train_profile.jsonl")
    return Path(folder)


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory):
    return write_bpe(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="session")
def bpe(bpe_folder) -> HFTokenizer:
    return HFTokenizer(bpe_folder)


@pytest.fixture(scope="session")
def spm(tmp_path_factory) -> SentencePieceTokenizer:
    return train_sentencepiece(sentences(), tmp_path_factory.mktemp("spm") / "tokenizer.model", 450)


@pytest.fixture(scope="session")
def qwen(checkpoint) -> HFTokenizer:
    return HFTokenizer(checkpoint)


@pytest.fixture(scope="session", params=["bpe", "spm", pytest.param("qwen", marks=pytest.mark.real)])
def tokenizer(request):
    """Each tokenizer in turn; the real one only with its marker."""
    return request.getfixturevalue(request.param)


# Own prompt files, short: contexts of about a hundred tokens.
SHORT_PROMPTS = {
    "user_system.j2": "{{ persona }}\n{{ scene }}\n{{ hidden_intention }}",
    "policy_think.j2": "Think, say.",
    "policy_direct.j2": "Say.",
    "opening.txt": "Go.",
    "appraisal.script": 'At {emotion}, "{band}".\nHeard:<<free:content>>\nFeel:<<free:feeling>>\n'
    "Change:\n<<choose:change>>",
    "reply.script": 'Now {emotion}, "{band}".\nTone:<<free:tone>>\nSay:<<free:reply>>',
}


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    for name, text in SHORT_PROMPTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    return load_prompts("en", folder)


def make_profiles(count: int) -> list[Profile]:
    """Profiles of different lengths; every third one leaves its first words to the user model."""
    talk = ["my boss did not listen.", None, "I felt awful"]
    who = ["I felt awful", "my friend said goodbye " * 4, "my boss did not listen, and she felt awful " * 2]
    return [
        Profile(f"p{i}", who[i % 3].strip(), f"scene {i}", "be heard", "calm", first_talk=talk[i % 3])
        for i in range(count)
    ]


def random_params(model: Qwen2, seed: int):
    """Initial parameters from NumPy: compiles nothing."""
    draw = np.random.default_rng(seed)
    shapes, _ = abstract_params(model)

    def leaf(path, x):
        noise = 0.05 * draw.standard_normal(x.shape)
        return jnp.asarray(1 + noise if path[-1].key == "scale" else noise, x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def write_debug_model(folder: Path) -> Qwen2:
    """Writes configs/debug.py's model with weights, not its initial ones, to a new folder; returns it, unrolled."""
    model = Qwen2(Qwen2Config.from_hf(WORLD), scan_layers=False)
    save_params(folder, random_params(model, 3), model.config, tokenizer_from=WORLD)
    return model


def vocabulary(tokenizer) -> np.ndarray:
    """Checksum of all tokens' bytes."""
    return np.array(zlib.crc32(b"\n".join(tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size))), np.int64)


def golden_lm(name: str, tokenizer) -> LM:
    """A tiny model that `make_tiny_models.py` has fitted to this tokenizer's texts."""
    sizes = TINY[name]
    config = Qwen2Config(tokenizer.vocab_size + 9, head_dim=16, rope_theta=1e4, **sizes)
    model = Qwen2(config, scan_layers=False)
    weights = safetensors.numpy.load_file(GOLDEN / f"{name}.safetensors")
    assert weights.pop("vocabulary") == vocabulary(tokenizer), "other merges: run python -m tests.make_tiny_models"
    shapes, _ = abstract_params(model)

    def leaf(path, x):
        array = weights.pop("/".join(key.key for key in path))
        assert array.shape == x.shape
        return jnp.asarray(array)

    params = jax.tree_util.tree_map_with_path(leaf, shapes)
    assert not weights, f"left over: {list(weights)}"
    return LM(params, model)


@pytest.fixture(scope="session")
def policy_lm(bpe) -> LM:
    return golden_lm("policy", bpe)


@pytest.fixture(scope="session")
def user_lm(bpe) -> LM:
    """Smaller than the policy in every size (one layer also halves what the dialogue tests wait for XLA)."""
    return golden_lm("user", bpe)


@pytest.fixture(scope="session")
def toy() -> LM:
    """Random weights, 57 embedding rows, and distributions that are far from uniform."""
    config = Qwen2Config(57, 32, 48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, rope_theta=1e4)
    model = Qwen2(config, scan_layers=False)
    return LM(jax.tree.map(lambda x: 4 * x if x.ndim == 2 else x, random_params(model, 7)), model)


@functools.partial(jax.jit, static_argnums=0)
def _plain(model: Qwen2, params, tokens):
    hidden, _ = model.apply({"params": params}, tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))
    return hidden, jax.nn.log_softmax(logits(params, hidden))


def plain(lm: LM, rows: list[list[int]], batch: int = 8) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Hidden states [len, D] and log-softmax [len, V] of each row by plain forward passes, without any cache."""
    width = -(-max(map(len, rows)) // 64) * 64
    padded = np.zeros((-(-len(rows) // batch) * batch, width), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    parts = [jax.device_get(_plain(lm.model, lm.params, part)) for part in padded.reshape(-1, batch, width)]
    hidden, logp = ([row for part in parts for row in part[k]] for k in (0, 1))
    cut = lambda arrays: [x[: len(row)] for x, row in zip(arrays, rows, strict=False)]  # noqa: E731
    return cut(hidden), cut(logp)


append_tokens = jax.jit(append)


def appended(lm: LM, rows: list[list[int]], capacity: int = 64, width: int = 24):
    """A cache that has read `rows`, as one ragged append."""
    tokens = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    count = jnp.asarray([len(row) for row in rows], jnp.int32)
    return append_tokens(lm, init_cache(lm, len(rows), capacity), tokens, count)


def literals(script: str, emotion: int, band: str) -> list[str]:
    """The literal before each field of a script's text, by string formatting; a free field owns its line end."""
    pieces, start, after_free = [], 0, False
    text = script.replace("{emotion}", str(emotion)).replace("{band}", band)
    for field in re.finditer(r"<<(free|choose):\w+>>\n?", text):
        pieces.append("\n" * after_free + text[start : field.start()])
        start, after_free = field.end(), field[1] == "free"
    return pieces


class Row(NamedTuple):
    """One context as plain ids, with the sampler's claims about it: `log p(token | ids[:place])` = value."""

    ids: list[int]
    claims: list[tuple[int, int, float]]  # place, token, value
    choice_at: int = 0  # user: where the change is chosen
    fields: tuple = ()  # user: (place, tokens) of each appraisal field


@dataclasses.dataclass(frozen=True)
class Fresh:
    """Contexts of logged dialogues as plain concatenations of messages; knows nothing of caches and tables.

    `d` is a `Dialogues` fetched to the host.
    """

    tokenizer: object
    think: bool
    floor: int
    ceiling: int

    @property
    def chat(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)

    def system(self, profile: Profile) -> str:
        return f"{profile.persona}\n{profile.scene}\n{profile.hidden_intention}"

    def spoken(self, tokens: list[int]) -> list[int]:
        """What the user hears of a reply: no stop token; in think mode what follows `</think>` and white space."""
        stops = (self.tokenizer.im_end_id, self.tokenizer.pad_id)
        tokens = tokens[:-1] if tokens and tokens[-1] in stops else tokens
        if not self.think:
            return tokens
        for n in range(len(tokens) + 1):
            if "</think>" in self.tokenizer.decode(tokens[:n]):
                rest = tokens[n:]
                while rest and self.tokenizer.token_bytes(rest[0]).isspace():
                    rest = rest[1:]
                return rest
        return []

    def heard(self, d, b: int, turn: int) -> list[int]:
        """What the policy hears before its reply number `turn`."""
        if turn == 0:
            return d.first_talk[b, : d.first_count[b]].tolist()
        return self.cut(d.user.reply, (turn - 1, -1, b))[0]

    def cut(self, generated, at) -> tuple[list[int], list[int]]:
        """(text, all tokens) of one generation."""
        tokens = generated.tokens[at][: generated.count[at]].tolist()
        return (tokens[:-1] if generated.stopped[at] else tokens), tokens

    def claims(self, generated, at, position: int) -> list[tuple[int, int, float]]:
        tokens = self.cut(generated, at)[1]
        return [(position + i, t, float(generated.raw_logprob[at][i])) for i, t in enumerate(tokens)]

    def policy_rows(self, d, b: int) -> list[Row]:
        chat, rows = self.chat, []
        ids = chat.message("system", SHORT_PROMPTS[f"policy_{'think' if self.think else 'direct'}.j2"])
        for t in range(d.turns[b]):
            ids = ids + chat.open("user") + self.heard(d, b, t) + chat.close + chat.open("assistant")
            opened = ids + (self.tokenizer.encode("<think>\n") if self.think else [])
            tokens = self.cut(d.policy.completion, (t, b))[1]
            rows.append(Row(opened + tokens, self.claims(d.policy.completion, (t, b), len(opened))))
            ids = ids + self.spoken(tokens) + chat.close
        return rows

    def opening(self, profile: Profile) -> list[int]:
        chat = self.chat
        return chat.message("system", self.system(profile)) + chat.message("user", "Go.") + chat.open("assistant")

    def user_rows(self, d, b: int, profile: Profile, max_turns: int) -> list[Row]:
        chat, rows = self.chat, []
        ids = self.opening(profile)
        for t in range(d.turns[b]):
            say = self.spoken(self.cut(d.policy.completion, (t, b))[1])
            if d.policy.violation[t, b]:
                break
            ids = ids + self.heard(d, b, t) + chat.close + chat.open("user") + say + chat.close + chat.open("assistant")
            rows.append(self.reasoning(ids, d.user, (t,), b, *d.emotions[b, t : t + 2], t + 1 < max_turns))
        return rows

    def reasoning(self, ids, user, t: tuple, b: int, before, after, more: bool) -> Row:
        """The context of one appraisal and reply; `t` indexes the turn (empty: `user` is one turn alone)."""
        encode, ids, claims, fields = self.tokenizer.encode, list(ids), [], []
        *lines, last = literals(SHORT_PROMPTS["appraisal.script"], before, self.band(before))
        for f, line in enumerate(lines):
            ids += encode(line)
            claims += self.claims(user.appraisal, (*t, f, b), len(ids))
            text, tokens = self.cut(user.appraisal, (*t, f, b))
            fields.append((len(ids), tokens))
            ids += text
        ids += encode(last)
        choice_at, change = len(ids), int(user.change[(*t, b)])
        if more and self.floor < after < self.ceiling:
            ids += encode(f"{change:+d}\n" if change else "0\n")
            for f, line in enumerate(literals(SHORT_PROMPTS["reply.script"], after, self.band(after))):
                ids += encode(line)
                claims += self.claims(user.reply, (*t, f, b), len(ids))
                ids += self.cut(user.reply, (*t, f, b))[0]
        return Row(ids, claims, choice_at, tuple(fields))

    def band(self, emotion) -> str:
        return "FCBAS"[int(np.digitize(emotion, [10, 40, 70, 100]))]


def check_claims(lm: LM, rows: list[Row], atol: float = 1e-4, batch: int = 8) -> int:
    """Asserts every claim against plain forward passes; returns how many there were."""
    for row, logp in zip(rows, plain(lm, [[*r.ids, 0] for r in rows], batch)[1], strict=True):
        want = [logp[position - 1, token] for position, token, _ in row.claims]
        np.testing.assert_allclose([value for *_, value in row.claims], want, atol=atol)
    return sum(len(row.claims) for row in rows)


def option_logprobs(lm: LM, tokenizer, ids: list[int]) -> np.ndarray:
    """log p of every change's text after `ids`, each in a row of its own."""
    options = [tokenizer.encode(f"{n:+d}\n" if n else "0\n") for n in range(-10, 11)]
    logp = plain(lm, [ids + option for option in options])[1]
    return np.array([sum(x[len(ids) - 1 + j, t] for j, t in enumerate(o)) for x, o in zip(logp, options, strict=True)])
