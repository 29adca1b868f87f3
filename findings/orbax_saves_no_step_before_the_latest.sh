#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: CheckpointManager.save saves nothing, and raises nothing, for a step that comes before the latest one there.
#
# A folder holds the steps 100, 200 and 300. save(150), save(200) and save(250) return False and leave it as it is, save(310) works. With
# save_interval_steps=1 one would expect 150 and 250 to be saved, and 200 to be replaced or refused with an error.
#
# Hurt: who restores step 100 to undo a divergence and trains on with the same manager or folder. The new steps up to 300 are kept
# nowhere; after a crash at 290 latest_step() is the diverged 300, and training resumes from that. Check what save returns, or delete
# the later steps first.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'orbax-checkpoint==0.12.8' 'jax==0.10.2'
cd "$work" && JAX_PLATFORMS=cpu venv/bin/python - 2> "$work/log" <<'PY' || { cat "$work/log" >&2; exit 1; }
import os

import numpy as np
import orbax.checkpoint as ocp

saved = {}
options = ocp.CheckpointManagerOptions(save_interval_steps=1)
with ocp.CheckpointManager(os.path.abspath("run"), options=options) as manager:
    for step in (100, 200, 300, 150, 200, 250, 310):
        value = float(len(saved))
        returned = manager.save(step, args=ocp.args.StandardSave({"x": np.full(2, value)}))
        manager.wait_until_finished()
        saved[len(saved)] = returned
        print(f"save({step}) returns {returned}; the folder has {manager.all_steps()}, latest_step() is {manager.latest_step()}")
    steps = list(manager.all_steps())
raise SystemExit([*saved.values()] != [True] * 3 + [False] * 3 + [True] or steps != [100, 200, 300, 310])
PY
