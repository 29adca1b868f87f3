#!/usr/bin/env bash
# optax 0.2.8: softmax_cross_entropy_with_integer_labels of the label -100 is the loss of the hundredth token from the end.
#
# -100 marks positions to be ignored in the data sets and collators of Hugging Face. Here a negative label counts from the end, as an index of
# Python does, while one that is too large gives NaN. One would expect zero, NaN or an error.
#
# Hurt: who moves a fine-tuning from torch to JAX with its data. Loss and gradients stay finite, the prompt and the padding are learned as
# well, and all of them are to predict one and the same token; with Qwen2.5's table it is one that no text has, so that its
# probability rises unseen. Give the function `where=labels >= 0` (it exists since 0.2.4), or a weight of zero.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'optax==0.2.8' 'jax==0.10.2'
cd "$work" && JAX_PLATFORMS=cpu venv/bin/python - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
import optax

VOCABULARY = 1000
logits = jax.random.normal(jax.random.key(0), (VOCABULARY,))
loss, gradient = {}, {}
for label in (-100, VOCABULARY):
    of = lambda logits, label=label: optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array(label))
    loss[label], gradient[label] = jax.value_and_grad(of)(logits)
    print(f"label {label}: loss {loss[label]:.4f}, the token whose logit is raised most: {jnp.argmin(gradient[label])}")
plain = -jax.nn.log_softmax(logits)[VOCABULARY - 100]
print(f"loss of the token {VOCABULARY - 100}: {plain:.4f}")
raise SystemExit(not (np.isclose(loss[-100], plain, atol=1e-5) and jnp.argmin(gradient[-100]) == VOCABULARY - 100 and np.isnan(loss[VOCABULARY])))
PY
