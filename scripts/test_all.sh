#!/usr/bin/env bash
# Sets up an environment and runs all checks: format, lint, types, tests (half an hour). Arguments go to pytest.
source "$(dirname "$0")/environment.sh"
ruff format --check .
ruff check .
mypy
python -m pytest -n "${PYTEST_WORKERS:-3}" --dist worksteal "$@"
