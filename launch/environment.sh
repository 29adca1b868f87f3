# shellcheck shell=bash
# Sourced by the scripts beside it: makes the virtual environment and installs the package into it.
#   VENV=DIR    the environment's folder          (default: .venv beside setup.py)
#   PYTHON=EXE  the interpreter, 3.11 or newer    (default: python3.11, else python3)
# make_environment EXTRAS sets $python to the environment's interpreter.
make_environment() {
  local venv="${VENV:-.venv}" base="${PYTHON:-$(command -v python3.11 || command -v python3)}"
  if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "$0: $base is $("$base" --version 2>&1), but Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11" >&2
    exit 2
  fi
  [ -x "$venv/bin/python" ] || "$base" -m venv "$venv"
  python="$venv/bin/python"
  "$python" -m pip install --quiet --disable-pip-version-check -e ".$1"
}
