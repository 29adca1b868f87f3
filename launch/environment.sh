# shellcheck shell=bash
# Sourced by the scripts beside it: makes the virtual environment and installs the package into it.
#   VENV=DIR    the environment's folder          (default: .venv beside setup.py)
#   PYTHON=EXE  the interpreter, 3.11 or newer    (default: python3, or where that is older, python3.13, 3.12 or 3.11)
# make_environment EXTRAS sets $python to the environment's interpreter.
make_environment() {
  local venv="${VENV:-.venv}" base="${PYTHON:-python3}" other
  [ -n "${PYTHON:-}" ] || for other in python3 python3.13 python3.12 python3.11; do
    ! new_enough "$other" || { base="$other" && break; }
  done
  if ! new_enough "$base"; then
    echo "$0: $base is $("$base" --version 2>&1), but Python 3.11 or newer is needed; set PYTHON=/path/to/python3.13" >&2
    exit 2
  fi
  [ -x "$venv/bin/python" ] || "$base" -m venv "$venv"
  python="$venv/bin/python"
  "$python" -m pip install --quiet --disable-pip-version-check -e ".$1"
}

# new_enough EXE: whether it is a Python that the package supports.
new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null
}
