#!/usr/bin/env bash
# The first run: makes a virtual environment, trains the miniature on this machine, shows a dialogue before and after,
# and writes a report of it all for the browser.
#   ./launch/local.sh [TRAIN FLAGS...]      e.g. --config.train.steps=20
#   RUN=DIR       folder of the run                         (default: runs/miniature_DATE_TIME)
#   CONFIG=FILE   e.g. configs/miniature.py:ppo,direct      (default: configs/miniature.py)
#   VENV=DIR, PYTHON=EXE    see launch/environment.sh
# The same RUN and flags resume an interrupted run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
trap '' PIPE
# Says something, if anyone listens: a closed terminal, a full disk or `| head` end no training.
say() {
  echo "$1" 2> /dev/null || true
}
run="${RUN:-runs/miniature_$(date +%Y%m%d_%H%M%S)}"
config="${CONFIG:-configs/miniature.py}"

say "installing into ${VENV:-.venv}"
make_environment ""
began=$SECONDS
# Held-out people are played below, before and after: not within the training too.
[ -e "$run/finished.json" ] ||
  "$python" -m rlver_jax.train --config="$config" --workdir="$run" --config.eval.every=0 "$@"
say ""
say "the policy before training, and after it"
"$python" -m rlver_jax.evaluate --config="$config" --out="$run/played_before" > /dev/null
"$python" -m rlver_jax.evaluate --config="$config" --checkpoint="$run" --before="$run/played_before" --out="$run/played_after"
"$python" -m rlver_jax.report "$run" "$run/played_before" "$run/played_after" --out="$run/report.html"
say "training and evaluation took $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s; the run's folder is $run"
