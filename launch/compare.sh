#!/usr/bin/env bash
# The README's table: trains the miniature with GRPO and PPO, with thoughts and without, and with RLVER's reward, three
# seeds each, one after the other, and prints what each kind of run came to. Runs that are there already are not repeated.
#   ./launch/compare.sh [TRAIN FLAGS...]
#   RUNS=DIR      folder of the runs                  (default: runs/compare)
#   KINDS="…"     config arguments                    (default: "grpo final direct ppo ppo,direct"; grpo: no argument)
#   SEEDS="…"                                         (default: "0 1 2")
#   VENV=DIR, PYTHON=EXE    see launch/environment.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
make_environment ""
runs="${RUNS:-runs/compare}"
for seed in ${SEEDS:-0 1 2}; do
  for kind in ${KINDS:-grpo final direct ppo ppo,direct}; do
    run="$runs/$kind-$seed"
    [ -e "$run/finished.json" ] || "$python" -m rlver_jax.train --config="configs/miniature.py:${kind/#grpo/}" \
      --workdir="$run" --config.train.seed="$seed" "$@"
  done
done
"$python" -m rlver_jax.miniature.compare "$runs"/*-*
