#!/usr/bin/env bash
# JAX 0.10.2 on CPU: the sum of a row of eight float32 depends on how many other rows the array has.
#
# jit(x.sum(axis=1)) adds up the same eight numbers in another order once the array has some hundred rows more, so the last bit of a
# row's sum changes with the size of the batch it stands in, or of the padding around it. The rows share nothing, and no thread has to
# split one; a guess would be that the batch decides where a row is summed, not how.
#
# Hurt: who recomputes rewards, losses or log-probs in batches of another size than they were first computed in, and compares bits; a
# check needs a bound (number of terms x eps x sum of magnitudes), or an order of its own.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2'
cd "$work" && JAX_PLATFORMS=cpu venv/bin/python - <<'PY'
import jax
import numpy as np

TERMS, ROWS = 8, 512
draw = np.random.default_rng(0)
rows = draw.normal(size=(ROWS, TERMS)).astype(np.float32)
others = draw.normal(size=(8192, TERMS)).astype(np.float32)
total = jax.jit(lambda x: x.sum(axis=1))
alone = np.concatenate([np.asarray(total(rows[i : i + 8])) for i in range(0, ROWS, 8)])
exact = rows.astype(np.float64).sum(axis=1)
changed = {}
for count in (512, 640, 733, 1000, 1024, 2000, 4096, 8192):
    found = np.asarray(total(np.concatenate([rows, others[: count - ROWS]])))[:ROWS]
    changed[count] = int((found != alone).sum())
    print(
        f"{count} rows: {changed[count]} of {ROWS} sums are others than those of the same rows in eights, by up to "
        f"{np.abs(found - alone).max():.2g} (largest error {np.abs(found - exact).max():.2g}, in eights {np.abs(alone - exact).max():.2g})"
    )
raise SystemExit(not any(changed.values()))
PY
