"""The real 0.5B checkpoint against transformers on torch (extra `parity`). Prints every measured figure (-s)."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.hf_weights import load_params, save_params
from rlver_jax.models.kv_cache import init_kv_cache
from rlver_jax.models.qwen import Qwen2, logits, unstack_layers
from rlver_jax.parallel.mesh import make_mesh

pytestmark = pytest.mark.parity

PROMPTS = [
    "I had a terrible day at work and nobody noticed.",
    "今天和妈妈吵了一架,心里很难受,不知道该怎么办。",
    "def quicksort(items):\n    if len(items) < 2:\n        return items\n",
    "你好！Tell me, 为什么 people say 'time heals'? 🙂\n\n1. ",
]


# Between two float32 programs: which way each rounds depends on the machine. On an AMD Zen 4 they differ by less than
# 1e-4 at every position; on an Intel Xeon by 1.2e-4, ours lying up to 1.7e-4 from the float64 logits, theirs 0.9e-4.
BETWEEN = 2e-4


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="extra `parity` is not installed")


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(checkpoint / "tokenizer.json"))


@pytest.fixture(scope="module")
def profile_ids(tokenizer, published):
    """(first line, count) -> ids of three published profiles from there on: what a simulated user reads."""
    profiles = [json.loads(line) for line in (published / "train_profile.jsonl").read_text("utf-8").splitlines()]

    def ids(first, count):
        text = "\n\n".join(p["player"] + "\n" + p["scene"] for p in profiles[first : first + 3])
        token_ids = tokenizer.encode(text).ids[:count]
        assert len(token_ids) == count
        return token_ids

    return ids


@pytest.fixture(scope="module")
def prompts(tokenizer, profile_ids):
    return [tokenizer.encode(p).ids for p in PROMPTS] + [profile_ids(6, 1500)]


@pytest.fixture(scope="module")
def reference(torch, checkpoint):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def expected(torch, reference, prompts):
    with torch.no_grad():
        return [reference(torch.tensor([ids])).logits[0].numpy() for ids in prompts]


@pytest.fixture(scope="module")
def float32(checkpoint):
    model = Qwen2(Qwen2Config.from_hf(checkpoint))
    return model, load_params(checkpoint, model)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens, pos, cache=None, start=None):
    hidden, cache = model.apply({"params": params}, tokens, pos, None, cache, start)
    return logits(params, hidden), cache


def whole(model, params, ids):
    """Padded to a multiple of 64, so that few lengths compile; padding at the end is never seen."""
    tokens = jnp.asarray(np.pad(np.asarray(ids), (0, -len(ids) % 64)))[None]
    logits, _ = forward(model, params, tokens, jnp.arange(tokens.shape[1])[None])
    return np.asarray(logits[0, : len(ids)])


def test_float32_logits(float32, prompts, expected):
    worst = [float(np.abs(whole(*float32, ids) - want).max()) for ids, want in zip(prompts, expected, strict=True)]
    print("max |difference of logits| per prompt:", worst)
    assert max(worst) <= BETWEEN


def test_float32_rounding_against_float64(torch, checkpoint, reference, float32, profile_ids):
    """Text with an ill-conditioned position, where two float32 programs differ by more than 1e-4: float64 decides."""
    from transformers import AutoModelForCausalLM

    ids = profile_ids(0, 600)
    with torch.no_grad():
        theirs = reference(torch.tensor([ids])).logits[0].numpy()
        float64_logits = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64).eval()
        float64_logits = float64_logits(torch.tensor([ids])).logits[0].numpy()
    mine = whole(*float32, ids)
    errors = {
        "ours": float(np.abs(mine - float64_logits).max()),
        "transformers": float(np.abs(theirs - float64_logits).max()),
    }
    print("max |error of float32 logits| against float64:", errors, "between them:", float(np.abs(mine - theirs).max()))
    assert errors["ours"] <= 1e-4


def test_float32_logits_chunked_attention(float32, prompts, expected):
    model = float32[0].clone(attention="chunked", attention_chunk=256)
    worst = float(np.abs(whole(model, float32[1], prompts[-1]) - expected[-1]).max())
    print("max |difference of logits|, chunked attention, 1,500 tokens:", worst)
    assert worst <= BETWEEN


def test_through_the_cache(float32, prompts, expected):
    """Prefill in two pieces, then one by one."""
    model, params = float32
    ids, want = prompts[-1], expected[-1]
    cache = init_kv_cache(model.config, 1, 1536, jnp.float32, scan_layers=True)
    parts = []
    for first, last in [(0, 700), (700, 1484)] + [(i, i + 1) for i in range(1484, 1500)]:
        tokens, pos = jnp.asarray([ids[first:last]]), jnp.arange(first, last)[None]
        part, cache = forward(model, params, tokens, pos, cache, jnp.array([first]))
        parts.append(np.asarray(part[0]))
    worst = float(np.abs(np.concatenate(parts) - want).max())
    print("max |difference of logits| through the cache:", worst)
    assert worst <= BETWEEN


def test_greedy_tokens(torch, float32, reference, prompts):
    """One by one through the cache, the prompt's too; layers unrolled, as scanned ones copy their weights each time."""
    model, params = float32[0].clone(scan_layers=False), unstack_layers(float32[1])
    for ids in prompts[:2]:
        with torch.no_grad():
            want = reference.generate(
                torch.tensor([ids]), max_new_tokens=64, min_new_tokens=64, do_sample=False,
                top_p=None, top_k=None, temperature=None, repetition_penalty=1.0,
            )[0, len(ids):].tolist()  # fmt: skip
        cache = init_kv_cache(model.config, 1, 128, jnp.float32, scan_layers=False)
        tokens_so_far, banned = list(ids), [151643, 151645]  # min_new_tokens bans the end tokens in transformers
        for at in range(len(ids) + 63):
            token, position = jnp.array([tokens_so_far[at : at + 1]]), jnp.array([at])
            part, cache = forward(model, params, token, position[None], cache, position)
            if at >= len(ids) - 1:
                row = np.asarray(part[0, -1]).copy()
                row[banned] = -np.inf
                tokens_so_far.append(int(row.argmax()))
        assert tokens_so_far[len(ids) :] == want


def test_on_a_mesh(checkpoint, prompts, expected):
    """2 x 4 (fsdp x tensor), eight fake devices: every parameter sharded, 14 heads not divisible by 4."""
    mesh = make_mesh(fsdp=2, tensor=4)
    model = Qwen2(Qwen2Config.from_hf(checkpoint))
    params = load_params(checkpoint, model, mesh=mesh)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    held = sum(s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards if s.device.id == 0)
    assert held < size / 7
    worst = []
    for which in (0, 1, 4):
        ids = prompts[which]
        tokens = jnp.asarray([ids, ids])
        with jax.set_mesh(mesh):
            actual, _ = forward(model, params, tokens, jnp.broadcast_to(jnp.arange(len(ids)), tokens.shape))
        worst.append(float(np.abs(np.asarray(actual) - expected[which]).max()))
    print("max |difference of logits| on fsdp 2 x tensor 4:", worst)
    assert max(worst) <= 1e-3


@pytest.mark.long
def test_bfloat16_next_token(torch, checkpoint, profile_ids):
    """Greedy next tokens over 2,000 positions of text, bfloat16 weights and activations, against float32.

    Printed beside it: how well transformers' own bfloat16 agrees with its float32, and with ours.
    """
    from transformers import AutoModelForCausalLM

    ids = profile_ids(0, 2000)
    model = Qwen2(Qwen2Config.from_hf(checkpoint), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    ours = whole(model, load_params(checkpoint, model), ids).argmax(-1)
    theirs = {}
    for dtype in (torch.bfloat16, torch.float32):
        reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
        with torch.no_grad():
            theirs[dtype] = reference(torch.tensor([ids])).logits[0].float().numpy().argmax(-1)
    float32_tokens = theirs[torch.float32]
    print(
        f"next-token agreement: our bfloat16 with transformers' float32 {(ours == float32_tokens).mean():.4f}, "
        f"transformers' bfloat16 with its float32 {(theirs[torch.bfloat16] == float32_tokens).mean():.4f}, "
        f"the two bfloat16s {(ours == theirs[torch.bfloat16]).mean():.4f}"
    )
    assert (ours == float32_tokens).mean() >= 0.98


def test_export_loads_in_transformers(torch, checkpoint, float32, prompts, expected, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_params(tmp_path / "out", float32[1], float32[0].config, tokenizer_from=checkpoint, max_shard_bytes=10**9)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        actual = model(torch.tensor([prompts[1]])).logits[0].numpy()
    np.testing.assert_array_equal(actual, expected[1])
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(PROMPTS[1]).input_ids == prompts[1]
    again = load_params(tmp_path / "out", float32[0])
    jax.tree.map(np.testing.assert_array_equal, float32[1], again)


LOAD = """
import re, sys, time
import jax, jax.numpy as jnp
from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.hf_weights import load_params
from rlver_jax.models.qwen import Qwen2
def peak_kb():  # of this program alone; getrusage counts what its parent had before exec
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
jax.block_until_ready(jnp.zeros(1) + 1)
# The config's reader imports transformers, which imports torch where there is one, as here.
model = Qwen2(Qwen2Config.from_hf(sys.argv[1]), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
before, start = peak_kb(), time.perf_counter()
params = jax.block_until_ready(load_params(sys.argv[1], model))
print(time.perf_counter() - start, (peak_kb() - before) / 1e6)
"""


@pytest.mark.real
def test_loading_time_and_memory(checkpoint):
    """bfloat16 load in a fresh process: at most 10 s and 1.5 GB above the interpreter's."""
    out = subprocess.run([sys.executable, "-c", LOAD, str(checkpoint)], check=True, capture_output=True, text=True)
    seconds, gigabytes = map(float, out.stdout.split())
    print(f"load: {seconds:.1f} s, {gigabytes:.2f} GB above the interpreter's")
    assert seconds <= 10
    assert 0.9 <= gigabytes <= 1.5  # the weights alone are 0.99
