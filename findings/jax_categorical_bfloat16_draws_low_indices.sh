#!/usr/bin/env bash
# JAX 0.10.2: jax.random.categorical of bfloat16 logits draws from the first thousandths of a vocabulary, if all tokens are alike.
#
# The noise is drawn in the logits' dtype. A bfloat16 uniform number has 256 values or so, so the largest noise is shared by hundreds of
# tokens of a vocabulary of 151,936, and of equals the first one wins: of 1,280 draws from equal logits every one lies among the first
# 1 % of the indices, where float32 spreads them over all. A rare token next to a likely one comes up half as often as it should. One
# would expect rounded logits to cost some accuracy, not the draw to depend on where a token stands in the vocabulary.
#
# Hurt: who samples from the logits of a bfloat16 model without a cast to float32: rollouts of reinforcement learning explore low token
# ids, and their log-probs, computed elsewhere in float32, describe another distribution than the one that was sampled.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2'
cd "$work" && JAX_PLATFORMS=cpu venv/bin/python - <<'PY'
import math

import jax
import jax.numpy as jnp
import numpy as np

VOCABULARY, DRAWS = 151_936, 64  # Qwen2.5's; draws of each of 20 keys
furthest, share = {}, {}
for dtype in (jnp.float32, jnp.bfloat16):
    name = jnp.dtype(dtype).name
    equal = jax.jit(lambda key, dtype=dtype: jax.random.categorical(key, jnp.zeros((DRAWS, VOCABULARY), dtype)))
    drawn = np.concatenate([np.asarray(equal(jax.random.key(seed))) for seed in range(20)])
    rare = jnp.array([0, -8], dtype)
    count = jax.jit(lambda key, rare=rare: jax.random.categorical(key, rare, shape=(4_000_000,)).sum())
    furthest[name], share[name] = drawn.max() / VOCABULARY, int(count(jax.random.key(0))) / 4_000_000
    print(
        f"{name}: {len(drawn)} draws from {VOCABULARY} equal logits: {len(set(drawn.tolist()))} different indices, the "
        f"largest at {furthest[name]:.2%} of the vocabulary; a token of probability {math.exp(-8):.2e} has share {share[name]:.2e}"
    )
wrong = furthest["bfloat16"] < 0.01 and share["bfloat16"] < 0.7 * math.exp(-8)
right = furthest["float32"] > 0.99 and abs(share["float32"] / math.exp(-8) - 1) < 0.1
raise SystemExit(not (wrong and right))
PY
