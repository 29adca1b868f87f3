#!/usr/bin/env bash
# Makes a virtual environment, installs the package with its test tools, and runs the default tests.
#   ./launch/test.sh [PYTEST ARGUMENTS...]
#   VENV=DIR    the environment's folder          (default: .venv beside setup.py)
#   PYTHON=EXE  the interpreter, 3.11 or newer    (default: python3.11, else python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${VENV:-.venv}"
python="${PYTHON:-$(command -v python3.11 || command -v python3)}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "launch/test.sh: $python is $("$python" --version 2>&1), but Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11" >&2
  exit 2
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[test]'
exec "$venv/bin/python" -m pytest "$@"
