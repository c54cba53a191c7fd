#!/usr/bin/env bash
# One machine, one rank or many:  bash launch/local.sh CONFIG RECIPE [key=value ...]
#
#   CONFIG              a file of accelerate_configs/ by its name: cpu, cpu-2, gpu, ddp, zero2, ... (README.md there)
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

config=$(accelerate_config "$1")
choose_python "$(environment_for "$1")"
shift

options=(--config_file "$config")
if [[ -n ${PEFTUNE_PROCESSES:-} ]]; then options+=(--num_processes "$PEFTUNE_PROCESSES"); fi
if [[ -n ${MAX_RESTARTS:-} ]]; then options+=(--max_restarts "$MAX_RESTARTS"); fi

# PEFTUNE_RANK_PROGRAM is for tests: a Python file that each rank runs in the place of `peftune train`.
program=(-m peftune train)
if [[ -n ${PEFTUNE_RANK_PROGRAM:-} ]]; then program=("$PEFTUNE_RANK_PROGRAM"); fi

exec "$python" "$root/launch/ranks.py" "${options[@]}" "${program[@]}" "$@"
