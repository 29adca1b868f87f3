#!/usr/bin/env bash
# What launch/tpu_pod.sh does on each worker. Everything lies in ~/rlver_jax_pod: source/ (the package), venv/, worker.log,
# and what is known of the command: command, pid, exit_status.
#   pod_worker.sh install [PYTHON] | start COMMAND… | resume | stop | status | logs LINES | free | run COMMAND…
set -euo pipefail
readonly HOME_FOLDER="$HOME/rlver_jax_pod"
readonly BUCKETS="$HOME_FOLDER/buckets"
readonly STOP_SECONDS=900  # a step of a large model may take minutes
cd "$HOME_FOLDER"
name="$(hostname)"

say() {
  echo "$name: $1"
}

refuse() {
  say "$1" >&2
  exit 1
}

running() {
  [ -e pid ] && kill -0 "$(cat pid)" 2> /dev/null
}

# Refuses where a command is still running.
free() {
  ! running || refuse "still runs $(cat command); --stop it first"
}

install() {
  cd source
  source launch/environment.sh
  [ $# -eq 0 ] || export PYTHON="$1"
  VENV="$HOME_FOLDER/venv" make_environment "[tpu]"
  say "installed"
}

# mounted WORD: the word with each gs://BUCKET/… replaced by its place in a folder, and the buckets mounted there.
mounted() {
  local word="$1" bucket
  while [[ "$word" =~ gs://([^/,]+) ]]; do
    bucket="${BASH_REMATCH[1]}"
    mkdir -p "$BUCKETS/$bucket"
    if ! mountpoint -q "$BUCKETS/$bucket"; then
      command -v gcsfuse > /dev/null || refuse "gs://$bucket needs gcsfuse, which is not installed; --setup can do so"
      # No caching of names: what one worker writes the others look for at once. Checkpoints are renamed as folders.
      gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --rename-dir-limit=200000 "$bucket" "$BUCKETS/$bucket" >&2
    fi
    word="${word/"gs://$bucket"/"$BUCKETS/$bucket"}"
  done
  printf '%s' "$word"
}

start() {
  free
  printf '%q ' "$@" > ./command
  local words=() word
  for word in "$@"; do
    word="$(mounted "$word")"
    words+=("$word")
  done
  rm -f pid exit_status
  nohup setsid bash source/launch/pod_worker.sh run "${words[@]}" > worker.log 2>&1 < /dev/null &
  local tries=100
  until [ -e pid ] || [ $((tries--)) -eq 0 ]; do sleep 0.1; done
  say "started $(cat command)"
}

# Runs the command and keeps its process id and exit status. Signals to this shell alone don't end it.
run() {
  export PATH="$HOME_FOLDER/venv/bin:$PATH"
  cd source
  "$@" &
  echo $! > ../pid.tmp && mv ../pid.tmp ../pid
  trap '' TERM HUP INT
  local status=0
  wait $! || status=$?
  echo "$status" > ../exit_status
}

resume() {
  [ -e command ] || refuse "has run no command yet; give one after --"
  eval "start $(cat command)"
}

status() {
  if running; then
    say "running · $(tail -n 1 worker.log)"
  elif [ -e exit_status ]; then
    say "ended with exit status $(cat exit_status) · $(tail -n 1 worker.log)"
  elif [ -e pid ]; then
    say "ended without an exit status: the machine or the process was killed · $(tail -n 1 worker.log)"
  else
    say "has run no command yet"
  fi
}

stop() {
  ! running || kill -TERM "$(cat pid)"
  local tries=$((STOP_SECONDS * 2))
  while running; do
    [ $((tries--)) -gt 0 ] || refuse "runs on $STOP_SECONDS s after SIGTERM, with process id $(cat pid); look at --logs"
    sleep 0.5
  done
  sleep 0.5  # until its exit status is written
  status
}

logs() {
  [ -e worker.log ] || refuse "has no log yet"
  tail -n "$1" worker.log | while IFS= read -r line || [ -n "$line" ]; do say "$line"; done
}

"$@"
