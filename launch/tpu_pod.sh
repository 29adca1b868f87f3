#!/usr/bin/env bash
# Runs one command on all workers of a Cloud TPU that is there already: nothing is created, nothing is deleted.
#
#   ./launch/tpu_pod.sh TPU [--zone=ZONE] [--project=ID] [--setup=COMMAND] [--env=NAME] [--dry-run] -- COMMAND…
#   ./launch/tpu_pod.sh TPU [--zone=ZONE] [--project=ID] [--dry-run] --status | --logs[=LINES] | --stop | --resume
#
#   COMMAND…      e.g. python -m rlver_jax.train --config=configs/ppo_think_7b.py --workdir=gs://BUCKET/runs/first …
#                 The package is copied to every worker and installed there with its extras `tpu` and `remote`; then it is
#                 started on all of them, in the background. The processes find each other by themselves.
#   --setup=…     runs on every worker before the installation, e.g. 'sudo apt-get install -y python3.11-venv'
#   --env=NAME    the command finds this variable of here in its environment, such as an API key; may be repeated. The
#                 value travels in a file that only its owner may read, and stays on the workers for --resume
#   --status      whether it runs on each worker, or with which exit status it ended
#   --logs[=N]    the last N lines (default: 20) of each worker's log, ~/rlver_jax_pod/worker.log
#   --stop        SIGTERM to all; training finishes its step and saves. Waits until it has ended
#   --resume      starts the last command again on all workers, as after --stop; training resumes from its checkpoint
#   --dry-run     prints what would be run, and runs nothing
#   PYTHON=EXE    the interpreter on the workers, 3.11 or newer (default: python3, or python3.13, 3.12, 3.11 where it is older)
#
# Every worker must see the same --workdir: a network folder, or gs://BUCKET/…, which is mounted with gcsfuse; so are
# all other gs://… in the command. When a worker is preempted it gets SIGTERM, and all of them finish the step and save;
# once the TPU is there again, the first form with the same command resumes (--resume, if its disks were kept).
# Exit status: 0 done, 1 a worker failed (its message says why), 2 bad usage.
set -eEuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly FOLDER=rlver_jax_pod  # in each worker's home; as in pod_worker.sh
readonly SCRIPT=$FOLDER/source/launch/pod_worker.sh
PACKAGE=(setup.py pyproject.toml README.md rlver_jax configs launch)

usage() {
  echo "tpu_pod.sh: $1; the head of launch/tpu_pod.sh has the usage" >&2
  exit 2
}

action="" lines=20 setup="" dry="" tpu="" where=() command=() variables=()
set_action() {
  [ -z "$action" ] || usage "--$action and --$1 together; one at a time"
  action="$1"
}
while [ $# -gt 0 ]; do
  case "$1" in
    --help) sed -n '2,/^set /{s/^# \{0,1\}//;/^set /d;p}' "${BASH_SOURCE[0]}" && exit 0 ;;
    --zone=* | --project=*) where+=("$1") ;;
    --setup=*) setup="${1#*=}" ;;
    --env=*) variables+=("${1#*=}") ;;
    --dry-run) dry=1 ;;
    --logs=*) set_action logs && lines="${1#*=}" ;;
    --status | --logs | --stop | --resume) set_action "${1#--}" ;;
    --) shift && command=("$@") && break ;;
    -*) usage "unknown option $1" ;;
    *) [ -z "$tpu" ] || usage "found '$1' after the TPU's name '$tpu'; the command comes after --" && tpu="$1" ;;
  esac
  shift
done
[ -n "$tpu" ] || usage "no TPU was named; 'gcloud compute tpus tpu-vm list' shows those that there are"
[[ "$lines" =~ ^[0-9]+$ ]] || usage "--logs=$lines: expected a number of lines"
[ -z "$action" ] || [ ${#command[@]} -eq 0 ] || usage "--$action takes no command"
for name in ${variables[@]+"${variables[@]}"}; do
  [[ "$name" =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || usage "--env takes the name of a variable; found something else (not shown)"
  [ -n "${!name+set}" ] || usage "--env=$name: no such variable here; export it first"
done
[ -z "$action" ] || [ ${#variables[@]} -eq 0 ] || usage "--$action takes no --env: --resume has the variables of the last command"
[ -n "$action" ] || [ ${#command[@]} -gt 0 ] || usage "neither a command after -- nor --status, --logs, --stop, --resume"
[ -n "$dry" ] || command -v gcloud > /dev/null || usage "there is no gcloud on PATH; install the Google Cloud CLI"

# run WORDS…: runs them, or prints them with --dry-run.
run() {
  if [ -n "$dry" ]; then
    printf '%q ' "$@" && echo
  else
    "$@"
  fi
}

# on_workers SHELL_TEXT: runs it on all workers at once.
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$tpu" ${where[@]+"${where[@]}"} --worker=all --command="$1"
}

# worker WORDS…: calls pod_worker.sh on all workers.
worker() {
  on_workers "[ -e $SCRIPT ] || { echo \"\$(hostname): nothing was started here\" >&2; exit 1; }; bash $SCRIPT $(printf '%q ' "$@")"
}

# to_workers FILE NAME: copies it into the folder of all workers.
to_workers() {
  run gcloud compute tpus tpu-vm scp "$1" "$tpu:$FOLDER/$2" ${where[@]+"${where[@]}"} --worker=all
}

copy_package() {
  local folder=/tmp
  [ -n "$dry" ] || folder="$(mktemp -d)"
  local archive="$folder/package.tar.gz"
  run tar -czf "$archive" --exclude=__pycache__ "${PACKAGE[@]}"
  on_workers "mkdir -p $FOLDER/source"
  to_workers "$archive" package.tar.gz
  [ -n "$dry" ] || rm -r "$folder"
  on_workers "tar -xzf $FOLDER/package.tar.gz -C $FOLDER/source"
}

# Variables for the command. Their values stand in no command line, and in no file that others may read.
copy_environment() {
  local file=/tmp/environment name
  [ -n "$dry" ] || file="$(mktemp)"  # with mode 600
  [ -n "$dry" ] || for name in ${variables[@]+"${variables[@]}"}; do printf 'export %s=%q\n' "$name" "${!name}"; done > "$file"
  on_workers "rm -f $FOLDER/environment && umask 077 && : > $FOLDER/environment"
  [ ${#variables[@]} -eq 0 ] || to_workers "$file" environment
  [ -n "$dry" ] || rm "$file"
}

failed() {
  echo "tpu_pod.sh: a worker of $tpu failed; its message is above" >&2
  exit 1
}

start() {
  # Before the copy: a running command must not lose its files.
  on_workers "! [ -e $SCRIPT ] || bash $SCRIPT free"
  [ -z "$setup" ] || on_workers "$setup"
  copy_package
  copy_environment
  worker install ${PYTHON:+"$PYTHON"}
  worker start "${command[@]}"
}

trap failed ERR
case "$action" in
  "") start ;;
  logs) worker logs "$lines" ;;
  *) worker "$action" ;;
esac
