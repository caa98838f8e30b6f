#!/usr/bin/env bash
# One base model, from the Hub to the Hub: discover once, compress until done, verify, push. Run it again after
# anything: each step goes on where it was.
#
#   scripts/compress_hub.sh BASE_MODEL OUT|ORG/NAME [OPTION OF COMPRESS ...]
#
# ORG/NAME is where the checkpoint is pushed; it is written to ./NAME. An OUT with no slash, or one that begins with
# . or /, is a folder, and nothing is pushed. Options go to compress (-k 32, --disk-budget 50GiB, --config FILE, ...).
# From the environment: DISCOVER, more options of discover ("--limit 1000 --min-downloads 10"); PUSH, of push
# ("--private"); BACKOFF, seconds before the first rerun (30), which double up to 15 minutes; HF_TOKEN, HF_HOME, ...
#
# A step that ends with 75 (the Hub is down, a full disk, another run holds the lock) is run again; with 3 (done, but
# adapters were left out) the job goes on, and ends with 3; with anything else it stops. SIGTERM stops it with 75.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,14s/^# \{0,1\}//p' "$0" >&2; exit 2; }
base=$1 target=$2
shift 2
if ! command -v lorashare-stream >/dev/null; then # from a clone: its environment, which is made without the Hub
  offline=${HF_HUB_OFFLINE-}
  here=$PWD
  source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
  cd "$here"
  export HF_HUB_OFFLINE=$offline
fi
case $target in
/* | .*) out=$target repo= ;;
*/*) out=${target##*/} repo=$target ;;
*) out=$target repo= ;;
esac
manifest=$out.manifest.jsonl
child=
trap '[ -z "$child" ] || { kill -TERM "$child" 2>/dev/null; wait "$child" || true; }; exit 75' TERM INT

step() { # runs a command until it ends with something else than 75; its exit code
  local code wait=${BACKOFF:-30}
  while true; do
    echo "+ $*" >&2
    code=0
    "$@" &
    child=$!
    wait "$child" || code=$?
    child=
    [ "$code" -eq 75 ] || return "$code"
    echo "$1 ended with 75: again in $wait s" >&2
    sleep "$wait" &
    child=$!
    wait "$child" || true
    child=
    wait=$((2 * wait < 900 ? 2 * wait : 900))
  done
}

# shellcheck disable=SC2086 # DISCOVER and PUSH are lists of options
[ -e "$manifest" ] || step lorashare-stream discover --base-model "$base" -o "$manifest" ${DISCOVER-}
skipped=0
step lorashare-stream compress "$manifest" -o "$out" --base-model "$base" "$@" || skipped=$?
[ "$skipped" -eq 0 ] || [ "$skipped" -eq 3 ] || exit "$skipped"
step lorashare-stream verify "$out"
# shellcheck disable=SC2086
[ -z "$repo" ] || step lorashare-stream push "$out" "$repo" ${PUSH-}
exit "$skipped"
