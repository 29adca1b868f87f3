#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: a NaN among the metrics makes CheckpointManager delete the best step and call a worse one the best.
#
# Steps 0 to 3 are saved with the scores 3, NaN, 1, 2, best_mode="max", and the two best are to be kept. The manager keeps steps 2 and 3
# (scores 1 and 2), deletes step 0, and best_step() is 3. Steps are sorted by score, and no order with a NaN in it means anything. One would
# expect the NaN to count as the worst, or to be refused by save().
#
# Hurt: who saves with an evaluation's score as the metric. One evaluation without a result, such as the mean of no dialogues or one
# diverged loss, and the best model so far is gone, without a message. Leave such a metric out: best_fn may then say what it counts for.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'orbax-checkpoint==0.12.8' 'jax==0.10.2'
cd "$work" && JAX_PLATFORMS=cpu venv/bin/python - 2> "$work/log" <<'PY' || { cat "$work/log" >&2; exit 1; }
import math
import os

import numpy as np
import orbax.checkpoint as ocp

kept = {}
for name, scores in (("numbers", [3.0, 0.5, 1.0, 2.0]), ("a NaN", [3.0, math.nan, 1.0, 2.0])):
    options = ocp.CheckpointManagerOptions(max_to_keep=2, best_fn=lambda metrics: metrics["score"], best_mode="max")
    with ocp.CheckpointManager(os.path.abspath(name), options=options) as manager:
        for step, score in enumerate(scores):
            manager.save(step, args=ocp.args.StandardSave({"x": np.full(2, score)}), metrics={"score": score})
        manager.wait_until_finished()
        kept[name] = (sorted(manager.all_steps()), manager.best_step())
    print(f"scores {scores}: steps {kept[name][0]} are kept, best_step() is {kept[name][1]}")
raise SystemExit(kept != {"numbers": ([0, 3], 0), "a NaN": ([2, 3], 3)})
PY
