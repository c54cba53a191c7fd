#!/usr/bin/env bash
# Several machines, on each of them the same command:  bash launch/multinode.sh CONFIG RECIPE [key=value ...]
#
# It runs `peftune launch --nodes ...`, which works without this script from any installation.
#
#   CONFIG          ddp, zero1, zero2, zero2-offload, zero3, zero3-offload, or any other file of accelerate_configs/
#   NNODES          how many machines
#   NODE_RANK       which of them this is, from 0
#   MASTER_ADDR     a name or address of machine 0 that every machine can reach
#   MASTER_PORT     a free port of machine 0 (default 29400)
#   NPROC           ranks on each machine (default: one for each GPU of this one)
#   MAX_RESTARTS    how often all ranks are started again after a crash, from the last checkpoint (default 0)
#   PEFTUNE_JOIN    seconds that machines wait for each other at the start (default 900)
#   PEFTUNE_GRACE   seconds that ranks have to save after SIGTERM or Ctrl-C (default 110)
#   PEFTUNE_PYTHON  an interpreter that has peftune (default: .venv here)
#
# Before the first start, once per file system:  bash launch/multinode.sh --prepare  makes .venv, DeepSpeed included.
# Data, base and run.out are paths that mean the same on every machine. Between the machines no port may be blocked.
# Machines with several networks: GLOO_SOCKET_IFNAME (CPU traffic; default: the one towards MASTER_ADDR) and
# NCCL_SOCKET_IFNAME (GPU traffic; default: NCCL's choice) name the interface to use.
# Exit codes are those of launch/local.sh, on each machine for its own ranks.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

case ${1:-} in
-h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}" && exit ;;
--prepare) make_environment deepspeed && exit ;;
esac
(($# >= 2)) || fail "expected CONFIG RECIPE [key=value ...], got $# arguments; bash launch/multinode.sh --help"

need_number() { # NAME VALUE LEAST
  [[ -n $2 ]] || fail "$1 is missing; bash launch/multinode.sh --help"
  if ! [[ $2 =~ ^[0-9]+$ ]] || (($2 < $3)); then fail "$1 is '$2', expected a number from $3"; fi
}

need_number NNODES "${NNODES:-}" 1
need_number NODE_RANK "${NODE_RANK:-}" 0
((NODE_RANK < NNODES)) || fail "NODE_RANK is $NODE_RANK, but with NNODES=$NNODES the last one is $((NNODES - 1))"
[[ -n ${MASTER_ADDR:-} ]] || fail "MASTER_ADDR is missing: a name or address of machine 0 that every machine can reach"
need_number MASTER_PORT "${MASTER_PORT:=29400}" 1
need_number MAX_RESTARTS "${MAX_RESTARTS:=0}" 0

if [[ -z ${PEFTUNE_PYTHON:-} ]]; then # machines that share the file system must not all make it at once
  [[ -x $venv/bin/python ]] || fail "no $venv yet; once, on one machine: bash launch/multinode.sh --prepare"
  PEFTUNE_PYTHON=$venv/bin/python
fi
choose_python run

options=(--nodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
options+=(--max-restarts "$MAX_RESTARTS")
if [[ -n ${NPROC:-} ]]; then
  need_number NPROC "$NPROC" 1
  options+=(--processes "$NPROC")
fi

exec "$python" -m peftune launch "${options[@]}" "$@"
