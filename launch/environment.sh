# shellcheck shell=bash
# Sourced by the scripts beside it: one virtual environment in the repository, `.venv`, with the pinned versions.
#
#   PYTHON                which interpreter to build it with (default: the first of the list below that works)
#   PEFTUNE_TORCH_INDEX   the package index to take torch from, and nothing else, such as PyTorch's index of CPU builds
#   PEFTUNE_PYTHON        an interpreter that has peftune already: nothing is made or installed

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
pins=$root/launch/constraints.txt

say() { printf '==> %s\n' "$*" >&2; }

fail() {
  printf 'peftune: %s\n' "$*" >&2
  exit 2
}

# Whether "$1" is new enough, and runs at all: a pyenv shim may not.
is_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

has_venv() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

find_python() {
  local candidate incomplete=""
  if [[ -n ${PYTHON:-} ]]; then
    is_python "$PYTHON" || fail "PYTHON is $PYTHON, which does not run or is older than 3.10; set it to a newer one"
    has_venv "$PYTHON" || fail "PYTHON is $PYTHON, which has no venv module; install it (Debian: python3-venv)"
    echo "$PYTHON"
    return
  fi
  for candidate in python3.12 python3.11 python3.10 python3.13 python3 python; do
    is_python "$candidate" || continue
    if has_venv "$candidate"; then
      echo "$candidate"
      return
    fi
    incomplete=$candidate
  done
  [[ -z $incomplete ]] || fail "$incomplete has no venv module; install it (Debian: apt-get install python3-venv) or set PYTHON"
  fail "found no Python 3.10 or newer; install one from python.org or your system's packages, or set PYTHON to its path"
}

# choose_python KIND: sets `python` to the interpreter to run with, PEFTUNE_PYTHON where it is set.
choose_python() {
  if [[ -n ${PEFTUNE_PYTHON:-} ]]; then
    command -v "$PEFTUNE_PYTHON" >/dev/null || fail "PEFTUNE_PYTHON is $PEFTUNE_PYTHON, which is not a program"
    python=$PEFTUNE_PYTHON
    return
  fi
  make_environment "$1"
  # shellcheck disable=SC2034  # for the script that sources this file
  python=$venv/bin/python
}

# environment_for CONFIG: which kind of environment a configuration of accelerate_configs/ needs.
environment_for() { [[ $1 == *zero* ]] && echo deepspeed || echo run; }

# make_environment run|deepspeed|dev: .venv with peftune and its server and, for the others, DeepSpeed or all that the
# tests need; left alone where it is complete.
make_environment() {
  local kind=$1 python identity stamp started=$SECONDS
  python=$(find_python) || exit $?
  identity=$("$python" -c 'import sys; print(sys.version, sys.base_prefix)' | tr '\n' ' ')
  stamp="$identity $root ${PEFTUNE_TORCH_INDEX:-} $(cksum <"$root/pyproject.toml") $(cksum <"$pins")"
  if is_stamped "$kind" "$stamp" || is_stamped dev "$stamp"; then
    return
  fi
  if ! is_stamped python "$identity"; then
    make_venv "$python"
    echo "$identity" >"$venv/peftune-python"
  fi
  install_pinned "$kind"
  echo "$stamp" >"$venv/peftune-$kind"
  say "installed in $((SECONDS - started)) s; the next start uses it as it is"
}

is_stamped() { [[ -x $venv/bin/python && -f $venv/peftune-$1 && $(<"$venv/peftune-$1") == "$2" ]]; }

make_venv() {
  if [[ -e $venv ]] && ! grep -qs "^prompt = 'peftune'" "$venv/pyvenv.cfg"; then
    fail "$venv is there and was not made by this script; remove or rename it, then start again"
  fi
  say "making .venv with $1, $("$1" --version 2>&1)"
  "$1" -m venv --clear --prompt peftune "$venv" || fail "could not make $venv, see the message above"
}

# Every file is one whose hash is in launch/constraints.txt, wherever it comes from; pip refuses all others.
install_pinned() {
  local extras=serve
  [[ $1 == run ]] || extras=$1,serve
  say "installing the versions of launch/constraints.txt; the first time takes minutes"
  # pip itself comes first, from a list of its own: older ones know no hashes in constraints.
  pip_install --requirement <(sed -n '/^pip==/,/[^\\]$/p' "$pins")
  # The build backend is next; isolated builds would take whatever is newest.
  pip_install hatchling editables setuptools
  install_torch
  # This repository has no hash, so it comes alone, and then what it needs.
  run_pip --no-index --no-deps --no-build-isolation --editable "$root" >&2 || installation_failed
  pip_install --no-build-isolation "peftune[$extras]"
}

# PEFTUNE_TORCH_INDEX serves torch and nothing else. Otherwise, without a GPU, a build for CPUs, if pip's settings know one.
install_torch() {
  local version
  version=$(sed -n 's/^torch==\([^ ]*\).*/\1/p' "$pins")
  if [[ -n ${PEFTUNE_TORCH_INDEX:-} ]]; then
    pip_install --no-deps --index-url "$PEFTUNE_TORCH_INDEX" torch
  elif [[ $(uname -s) == Linux ]] && ! command -v nvidia-smi >/dev/null; then
    hashed_pip --no-deps "torch==$version+cpu" >&2 2>/dev/null ||
      say "no NVIDIA GPU here, yet torch brings gigabytes of CUDA libraries; PEFTUNE_TORCH_INDEX avoids that (README.md)"
  fi
}

pip_install() { hashed_pip "$@" >&2 || installation_failed; }

hashed_pip() { run_pip --require-hashes --constraint "$pins" "$@"; }

run_pip() { "$venv/bin/python" -m pip install --disable-pip-version-check "$@"; }

installation_failed() {
  fail "the installation failed, see above; without a network it cannot work, otherwise start the same command again"
}
