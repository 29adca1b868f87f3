#!/usr/bin/env bash
# safetensors 0.8.0: safetensors.numpy writes an array's memory as it lies, so that a transpose or a slice is read back with other numbers.
#
# save and save_file of x.T, of an array in Fortran order, of x[:, :2] or of x[::2] give a file with the right shape whose numbers stand in
# other places, or are not of the array at all, without an error or a warning. 0.7.0 wrote all of them correctly. One would expect
# the same, or an error that asks for a contiguous array, as safetensors.torch raises.
#
# Hurt: whoever turns weights of Flax ([in, out]) into Hugging Face's ([out, in]) with .T, or cuts a fused or padded matrix, on the way into a
# file. The model loads, and computes nonsense; square matrices don't even look odd. Save np.ascontiguousarray(x).
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cat > "$work/save.py" <<'PY'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load, load_file, save, save_file

x = np.arange(12, dtype=np.float32).reshape(3, 4)
cases = {"x": x, "x.T": x.T, "Fortran order": np.asfortranarray(x), "x[:, :2]": x[:, :2], "x[::2]": x[::2]}
wrong = []
for name, array in cases.items():
    save_file({"a": array}, "file.safetensors")
    back = [load_file("file.safetensors")["a"], load(save({"a": array}))["a"]]
    assert all(one.shape == array.shape for one in back)
    equal = [bool((one == array).all()) for one in back]
    assert equal[0] == equal[1]
    wrong += [name] * (not equal[0])
    print(f"safetensors {safetensors.__version__}: {name:14} {'as it was' if equal[0] else f'{array.ravel().tolist()} is read as {back[0].ravel().tolist()}'}")
raise SystemExit(wrong != (list(cases)[1:] if sys.argv[1] == "wrong" else []))
PY
for version in 0.7.0 0.8.0; do
  "${PYTHON:-python3}" -m venv "$work/$version"
  "$work/$version/bin/pip" install -q "safetensors==$version" 'numpy==2.4.6'
done
cd "$work"
0.7.0/bin/python save.py right
0.8.0/bin/python save.py wrong
