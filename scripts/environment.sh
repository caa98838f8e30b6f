# Sourced by the other scripts: an environment in .venv, with pinned versions; made once, then only activated.
# Another Python is taken from PYTHON, another place for the environment from VENV.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}
[[ $VENV = /* ]] || VENV=$PWD/$VENV # not by realpath -m, which macOS has not
wanted=$(cat pyproject.toml constraints.txt | cksum)
if [ "$(cat "$VENV/.made-from" 2>/dev/null)" != "$wanted" ]; then
  python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or later is needed; name one: PYTHON=python3.12 $0" >&2
    exit 1
  }
  if [ -e "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ]; then
    echo "$VENV is there, and is no Python environment: remove it, or set VENV" >&2
    exit 1
  fi
  echo "setting up $VENV (some minutes, once)" >&2
  "$python" -m venv --clear "$VENV"
  "$VENV/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
  echo "$wanted" >"$VENV/.made-from"
fi
export PATH="$VENV/bin:$PATH" HF_HUB_OFFLINE=1
