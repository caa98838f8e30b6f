#!/usr/bin/env bash
# From a fresh clone: an environment, a small real collection trained by PEFT, the main job on it, and a look at the result.
# Everything is written to the folder given, which must be new or an earlier quickstart's, or to build/quickstart.
source "$(dirname "$0")/environment.sh"
python scripts/quickstart.py "${1:-build/quickstart}"
