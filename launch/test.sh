#!/usr/bin/env bash
# Style, types and every test, in the pinned environment; arguments go to pytest:  bash launch/test.sh -k merge
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

make_environment dev
cd "$root"
failed=()

check() {
  say "$1"
  "$venv/bin/python" -m "${@:2}" || failed+=("$1")
}

check "format" ruff format --check .
check "lint" ruff check .
check "types" mypy
check "tests" pytest -q --durations=10 "$@"

if ((${#failed[@]})); then
  say "failed: ${failed[*]}"
  exit 1
fi
say "all passed"
