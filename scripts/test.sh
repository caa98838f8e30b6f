#!/usr/bin/env bash
# Sets up an environment and runs the checks that take minutes: format, lint, types, and all tests but those marked slow.
exec "$(dirname "$0")/test_all.sh" -m "not slow" "$@"
