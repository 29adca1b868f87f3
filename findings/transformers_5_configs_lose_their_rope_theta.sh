#!/usr/bin/env bash
# transformers 5.24 and 4.57: a Qwen config that version 5 has saved is read by version 4 with a rope base of 10,000, without a warning.
#
# Version 5 writes rope_theta inside a new entry rope_parameters, and none at the top level, where version 4 and most readers of config.json
# look for it; a missing one has the default 10,000. Qwen2.5 and Qwen3 have 1,000,000. One would expect the old entry beside the new one,
# or an error where none is found.
#
# Hurt: who saves a model with transformers 5 (fine-tuning, merging an adapter, from_pretrained and save_pretrained to change the dtype) and
# reads the folder with anything older, or with a reader of its own. All weights load, and every position is rotated wrongly: short
# texts look a little worse, long ones fall apart. Look for rope_parameters before rope_theta.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
for version in 5.24.0 4.57.6; do
  "${PYTHON:-python3}" -m venv "$work/$version"
  "$work/$version/bin/pip" install -q "transformers==$version"
done
cd "$work"
5.24.0/bin/python - 2> /dev/null <<'PY'
import json

from transformers import Qwen2Config, Qwen3Config

for Config in (Qwen2Config, Qwen3Config):
    Config(rope_theta=1_000_000.0).save_pretrained(Config.__name__)
    saved = json.load(open(f"{Config.__name__}/config.json"))
    print(f"version 5 saves {Config.__name__} with rope_theta {saved.get('rope_theta')}, rope_parameters {saved['rope_parameters']}")
    assert "rope_theta" not in saved and saved["rope_parameters"]["rope_theta"] == 1_000_000
PY
4.57.6/bin/python - 2> "$work/warnings" <<'PY'
from transformers import AutoConfig

read = {name: AutoConfig.from_pretrained(name).rope_theta for name in ("Qwen2Config", "Qwen3Config")}
print(f"version 4 reads {read}")
raise SystemExit(set(read.values()) != {10_000.0})
PY
if grep -i rope "$work/warnings"; then echo "there is a warning now" && exit 1; fi
