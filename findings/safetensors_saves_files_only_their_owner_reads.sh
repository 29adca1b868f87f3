#!/usr/bin/env bash
# safetensors 0.8.0: save_file makes a file that nobody but its owner can read, whatever the umask says.
#
# With umask 022 a file of open(), or of numpy's save, has mode 644, and so has one of save_file in safetensors 0.7.0. In 0.8.0 it has
# mode 600. One would expect the umask to decide, as it does for every other file of a program.
#
# Hurt: who writes checkpoints to a folder that others read: a group's shared disk, a mounted bucket, a server that runs as another
# user. Writing succeeds, and the reader is refused later, somewhere else.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
for version in 0.7.0 0.8.0; do
  "${PYTHON:-python3}" -m venv "$work/$version"
  "$work/$version/bin/pip" install -q "safetensors==$version" 'numpy==2.3.4'
  (cd "$work" && umask 022 && "$version/bin/python" - "$version" <<'PY'
import os
import sys

import numpy as np
from safetensors.numpy import save_file

version = sys.argv[1]
np.save("plain.npy", np.zeros(3))
save_file({"x": np.zeros(3)}, "model.safetensors")
plain, saved = (os.stat(name).st_mode & 0o777 for name in ("plain.npy", "model.safetensors"))
print(f"safetensors {version}, umask 022: np.save makes a file of mode {plain:o}, save_file one of mode {saved:o}")
os.remove("model.safetensors")
raise SystemExit((plain, saved) != (0o644, {"0.7.0": 0o644, "0.8.0": 0o600}[version]))
PY
  )
done
