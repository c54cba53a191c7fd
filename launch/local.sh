#!/usr/bin/env bash
# One machine, one rank or many:  bash launch/local.sh CONFIG RECIPE [key=value ...]
#
# It makes .venv at the first start, then runs `peftune launch`, which works without this script from any installation.
#
#   CONFIG              a name (cpu, cpu-2, gpu, ddp, zero2, ...; accelerate_configs/README.md) or a file
#   PEFTUNE_PROCESSES   how many ranks (default: what CONFIG says, else one for each GPU)
#   MAX_RESTARTS        how often ranks are started again after a crash, from the last checkpoint (default 0)
#   PEFTUNE_GRACE       seconds that ranks have to save after SIGTERM or Ctrl-C (default 110)
#   PEFTUNE_PYTHON      an interpreter that has peftune (default: .venv here, made at the first start)
#
# Exit codes: 0 done, 2 the input is at fault, 3 stopped with a checkpoint saved (start it again), 4 a check failed,
# 1 a rank crashed or was killed.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

case ${1:-} in
-h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}" && exit ;;
esac
(($# >= 2)) || fail "expected CONFIG RECIPE [key=value ...], got $# arguments; bash launch/local.sh --help"

choose_python "$(environment_for "$1")"
options=(--max-restarts "${MAX_RESTARTS:-0}")
if [[ -n ${PEFTUNE_PROCESSES:-} ]]; then options+=(--processes "$PEFTUNE_PROCESSES"); fi

exec "$python" -m peftune launch "${options[@]}" "$@"
