"""Several adapters on one model, in one batch: each row against a plain pass with W + s A B, by name and anew."""

import contextlib
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest

from configs.debug import WORLD
from rlver_jax.config.validate import ConfigError
from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.lora import LoRA, abstract_adapter, applied, merged
from rlver_jax.models.peft_files import save_adapter
from rlver_jax.models.qwen import Qwen2
from rlver_jax.serving import programs
from rlver_jax.serving.adapters import Adapters, named_folders
from rlver_jax.serving.engine import BASE, Engine, GenerationParams
from tests.conftest import plain
from tests.serving.conftest import serving
from tests.serving.test_engine import generate
from tests.test_serve import served

LORAS = {"calm": LoRA(3, 6.0, ("q", "v", "down")), "bold": LoRA(2, 9.0, ("o", "up", "q"), rank_stabilized=True)}
NEW, ROWS, CONTEXT = 12, 4, 64


def drawn(model, lora, seed):
    draw, (shapes, _) = np.random.default_rng(seed), abstract_adapter(model, lora)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * draw.standard_normal(x.shape), x.dtype), shapes)


@pytest.fixture(scope="module")
def adapters(policy_lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, lora) in enumerate(LORAS.items()):
        save_adapter(folder / name, drawn(policy_lm.model, lora, seed), policy_lm.model.config, lora, base="BASE")
    loaded = jax.device_put(policy_lm, jax.devices()[0])
    return Adapters(loaded, {name: str(folder / name) for name in LORAS})


@pytest.fixture(scope="module")
def engine(adapters, bpe):
    lm, owners = adapters.beside_model()
    assert owners == [0, 0, 0, 1, 1]
    return Engine(lm, bpe, rows=ROWS, context=CONTEXT, block=3, owners=owners)


@pytest.fixture(scope="module")
def url(engine):
    with serving(engine, adapters=tuple(LORAS)) as address:
        yield address


def whole_model(lm, name, seed):
    """The model that a name stands for, with its adapter's products in its matrices."""
    if name is None:
        return lm
    return lm.replace(params=merged(applied(lm.params, drawn(lm.model, LORAS[name], seed), LORAS[name])))


def check(engine, models, bpe):
    """Greedy tokens of a batch in which rows differ are the likeliest of each one's own model."""
    prompts = [bpe.encode("my boss did not listen"), bpe.encode("I felt awful, and she"), bpe.encode("go on")]
    asked = [(number, prompt) for prompt in prompts for number in models]
    wanted = [GenerationParams(prompt, NEW, temperature=0, adapter=number) for number, prompt in asked]
    replies = generate(engine, *wanted)
    ends = {"stop": [bpe.im_end_id], "length": []}
    generated = [
        [score.token for chunk in reply for score in chunk.scores] + ends[reply[-1].finish] for reply in replies
    ]
    for number, lm in models.items():
        rows = [(prompt, tokens) for (n, prompt), tokens in zip(asked, generated, strict=True) if n == number]
        for (prompt, tokens), logp in zip(rows, plain(lm, [p + t for p, t in rows])[1], strict=True):
            np.testing.assert_array_equal(logp[len(prompt) - 1 : -1].argmax(-1), tokens)
    assert sum(map(len, generated)) > 3 * len(models)
    return generated


def test_rows_of_one_batch_have_adapters_of_their_own(engine, url, policy_lm, bpe):
    models = {BASE: whole_model(policy_lm, None, 0), 0: whole_model(policy_lm, "calm", 0)}
    models |= {1: whole_model(policy_lm, "bold", 1)}
    generated = check(engine, models, bpe)
    assert len({tuple(tokens) for tokens in generated[:3]}) == 3, "three models say three things"


def test_requests_name_them(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        listed = {m.id: getattr(m, "parent", None) for m in client.models.list()}
        assert listed == {"tiny": None, "calm": "tiny", "bold": "tiny"}
        asked = {"prompt": "my boss did not listen", "temperature": 0, "max_tokens": NEW}
        replies = {name: client.completions.create(model=name, **asked) for name in listed}
        assert {name: reply.model for name, reply in replies.items()} == {name: name for name in listed}
        assert len({reply.choices[0].text for reply in replies.values()}) == 3
        with pytest.raises(openai.NotFoundError, match="'bald' does not exist; this server has 'tiny', 'calm', 'bold'"):
            client.completions.create(model="bald", **asked)


def test_they_are_read_anew_while_it_serves(adapters, engine, url, policy_lm, bpe, tmp_path):
    compiled, config = programs.compiled(), policy_lm.model.config
    folders = {name: str(tmp_path / name) for name in LORAS}
    for seed, (name, lora) in enumerate(LORAS.items(), 2):
        save_adapter(tmp_path / name, drawn(policy_lm.model, lora, seed), config, lora, base="BASE")
    other = Adapters(adapters.lm, folders)
    assert other.swap(engine) == "read anew: calm, bold"
    check(engine, {0: whole_model(policy_lm, "calm", 2), 1: whole_model(policy_lm, "bold", 3)}, bpe)
    assert programs.compiled() == compiled
    before, rank = engine.lm, LoRA(4, 6.0)
    save_adapter(tmp_path / "more", drawn(policy_lm.model, rank, 9), config, rank, base="BASE")
    assert "ranks or targets have changed" in Adapters(adapters.lm, folders | {"calm": f"{tmp_path}/more"}).swap(engine)
    assert "no adapter can be read" in Adapters(adapters.lm, folders | {"calm": str(tmp_path)}).swap(engine)
    assert engine.lm is before


def test_what_is_refused(adapters, tmp_path):
    for flags, message in ((["calm"], "expected NAME=FOLDER"), (["a=x", "a=y"], "name of another"), (["m=x"], "'m'")):
        with pytest.raises(ConfigError, match=message):
            named_folders(flags, "m")
    with pytest.raises(ConfigError, match=r"--adapter=a=gs://b/c: gs://b/c: is a URL"):
        named_folders(["a=gs://b/c"], "m")
    assert named_folders(["a=x=y", "b=~/z"], "m") == {"a": "x=y", "b": str(Path.home() / "z")}
    with pytest.raises(ConfigError, match="the checkpoint's policy is an adapter itself"):
        Adapters(adapters.beside_model()[0], adapters.folders).beside_model()


@pytest.mark.slow
def test_a_server_reads_them_anew_at_a_signal(tmp_path):
    model, lora, folder = Qwen2(Qwen2Config.from_hf(WORLD), scan_layers=False), LoRA(2, 8.0), tmp_path / "calm"
    save = lambda seed: save_adapter(folder, drawn(model, lora, seed), model.config, lora, base="BASE")  # noqa: E731
    save(1)
    with contextlib.ExitStack() as stack:
        process, url = stack.enter_context(served("--rows=2", "--name=mine", f"--adapter=calm={folder}"))
        client = stack.enter_context(openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0))
        asked = {"prompt": "hello", "temperature": 0, "max_tokens": NEW}
        say = lambda name: client.completions.create(model=name, **asked).choices[0].text  # noqa: E731
        first = say("mine"), say("calm")
        shutil.rmtree(folder)
        save(2)
        process.send_signal(signal.SIGHUP)
        while "read anew: calm" not in (line := process.stdout.readline()):
            assert line, "it has ended"
        second = say("mine"), say("calm")
        assert second[0] == first[0]
        assert len({*first, *second}) == 3
