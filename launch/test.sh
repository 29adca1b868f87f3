#!/usr/bin/env bash
# Makes a virtual environment, installs the package with its test tools, and runs the default tests on all cores.
#   ./launch/test.sh [PYTEST ARGUMENTS...]
#   VENV=DIR, PYTHON=EXE    see launch/environment.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
make_environment "[test]"
exec "$python" -m pytest -n auto --dist loadfile "$@"
