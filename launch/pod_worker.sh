#!/usr/bin/env bash
# What launch/tpu_pod.sh does on each worker. Everything lies in ~/rlver_jax_pod: source/ (the package), venv/, worker.log,
# and what is known of the command: command, environment (of --env), pid, process (its pid, start and boot), exit_status.
# Needs Linux's /proc.
#   pod_worker.sh install [PYTHON] | start COMMAND… | resume | stop | status | logs LINES | free | run COMMAND…
set -euo pipefail
readonly HOME_FOLDER="$HOME/rlver_jax_pod"
readonly BUCKETS="$HOME_FOLDER/buckets"
readonly STOP_SECONDS=900  # a step of a large model may take minutes
readonly START_SECONDS=60
readonly BOOT_ID=/proc/sys/kernel/random/boot_id
cd "$HOME_FOLDER"
name="$(hostname)"

say() {
  echo "$name: $1"
}

refuse() {
  say "$1" >&2
  exit 1
}

# identity PID: "PID START BOOT": a live process, when it started, in clock ticks, and which boot counts them. No two
# processes share it, as they do a PID. Fails where there is no such process.
identity() {
  local text fields
  text="$(cat "/proc/$1/stat" 2> /dev/null)" || return 1
  read -ra fields <<< "${text##*) }"  # proc(5), from field 3 on: the name before it may hold anything
  [[ "${fields[0]}" != [ZX] ]] && echo "$1 ${fields[19]} $(cat "$BOOT_ID")"
}

# started_here PID: whether `run` started it, by the environment that it was given.
started_here() {
  local variable
  while IFS= read -r -d '' variable; do
    [[ "$variable" != "PATH=$HOME_FOLDER/venv/bin:"* ]] || return 0
  done 2> /dev/null < "/proc/$1/environ"
  return 1
}

# whole FILE PATTERN: whether it holds such a line, not half of one; sets $line.
whole() {
  line=""
  [ -e "$1" ] && IFS= read -r line < "$1" && [[ "$line" =~ ^$2$ ]]
}

# Whether the last command still runs; sets $ours to its process id. Whoever got that id after it, or after another
# boot, is not taken for it.
running() {
  local line file
  ours=""
  if whole process '[1-9][0-9]{0,9} [0-9]+ [0-9a-f-]{36}'; then
    [ "$(identity "${line%% *}")" != "$line" ] || ours="${line%% *}"
  elif whole pid '[1-9][0-9]{0,9}'; then  # of an earlier version, or `process` is damaged
    ! started_here "$line" || ! identity "$line" > /dev/null || ours="$line"
  else
    for file in process pid; do
      # What was written before this boot is of a process that is gone.
      [ ! -e "$file" ] || [ "$(stat -c %Y "$file")" -lt "$(awk '/^btime / { print $2 }' /proc/stat)" ] ||
        refuse "$HOME_FOLDER/$file is damaged and doesn't tell whether the last command still runs ($(cat command 2> /dev/null));\
 look with ps -ef, end it if it does, and remove the file"
    done
  fi
  [ -n "$ours" ]
}

# Refuses where a command is still running.
free() {
  ! running || refuse "still runs $(cat command); --stop it first"
}

install() {
  cd source
  source launch/environment.sh
  [ $# -eq 0 ] || export PYTHON="$1"
  VENV="$HOME_FOLDER/venv" make_environment "[tpu,remote]"
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
  rm -f process pid exit_status
  nohup setsid bash source/launch/pod_worker.sh run "${words[@]}" > worker.log 2>&1 < /dev/null &
  local tries=$((START_SECONDS * 10))
  until [ -e pid ]; do
    [ $((tries--)) -gt 0 ] || refuse "did not start: $(tail -n 1 worker.log)"
    kill -0 $! 2> /dev/null || tries=0  # a last look
    sleep 0.1
  done
  say "started $(cat command)"
}

# keep FILE LINE: whole or not at all, on the disk too.
keep() {
  echo "$2" > "../$1.tmp" && sync "../$1.tmp" && mv "../$1.tmp" "../$1"
}

# keep_process PID
keep_process() {
  local known
  known="$(identity "$1")" || known=""  # it may have ended already
  { [ -z "$known" ] || keep process "$known"; } && keep pid "$1"
}

# Runs the command and keeps its process id and exit status. Signals to this shell alone don't end it.
run() {
  export PATH="$HOME_FOLDER/venv/bin:$PATH"
  # shellcheck disable=SC1091 # what tpu_pod.sh --env has written
  [ ! -e environment ] || source ./environment
  cd source
  "$@" &
  local status=0 process=$!
  keep_process "$process" || { kill -KILL "$process" && refuse "its process id cannot be written"; }
  trap '' TERM HUP INT
  wait "$process" || status=$?
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
  elif [ -e pid ] || [ -e process ]; then
    say "ended without an exit status: the machine or the process was killed · $(tail -n 1 worker.log)"
  else
    say "has run no command yet"
  fi
}

stop() {
  local tries=$((STOP_SECONDS * 10))
  if running; then
    kill -TERM "$ours" 2> /dev/null || true  # it may have ended by now
    while running; do
      [ $((tries--)) -gt 0 ] || refuse "runs on $STOP_SECONDS s after SIGTERM, with process id $ours; look at --logs"
      sleep 0.1
    done
    sleep 0.5  # until its exit status is written
  fi
  status
}

# Before anything is taken for running or not.
check_proc() {
  { [ -r "$BOOT_ID" ] && [ -r /proc/self/stat ]; } ||
    refuse "needs /proc of Linux to tell its process from others, but $BOOT_ID or /proc/self/stat cannot be read"
}

logs() {
  [ -e worker.log ] || refuse "has no log yet"
  tail -n "$1" worker.log | while IFS= read -r line || [ -n "$line" ]; do say "$line"; done
}

check_proc
"$@"
