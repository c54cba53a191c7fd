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
# Types beside the tests, which leave a part of the second core idle; what mypy says is shown after them.
types=$(mktemp)
trap 'rm -f "$types"' EXIT
"$venv/bin/python" -m mypy >"$types" 2>&1 &
# Two tests at a time, one thread each: as fast as two cores can, and not slower where there are more. A file's tests stay
# together, which makes what they share once; tests/conftest.py begins with the longest.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
check "tests" pytest -q -n 2 --dist loadscope --no-loadscope-reorder --durations=10 "$@"
if command -v nvidia-smi >/dev/null; then # the tests before see no GPU
  check "tests on a GPU" pytest -q -m gpu
fi
say "types"
wait $! || failed+=("types")
cat "$types"

if ((${#failed[@]})); then
  say "failed: ${failed[*]}"
  exit 1
fi
say "all passed"
