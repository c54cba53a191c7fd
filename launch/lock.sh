#!/usr/bin/env bash
# Writes launch/constraints.txt: every package that the scripts install, with the SHA-256 of each of its files.
#
#   bash launch/lock.sh              keeps the versions that are there; adds what pyproject.toml asks for besides
#   bash launch/lock.sh --upgrade    takes the newest versions
#
# Needs uv (pip install uv) and a network.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
made=$(mktemp)
trap 'rm -f "$made"' EXIT
cp launch/constraints.txt "$made"
# pip and the build backend are installed before the rest, so no extra names them.
printf '%s\n' pip hatchling editables |
  uv pip compile pyproject.toml - --extra dev --extra serve --universal --python-version 3.10 --generate-hashes \
    --no-annotate --no-header --output-file "$made" "$@" >/dev/null
{
  cat <<'HEADER'
# The exact versions that peftune is tested with, development tools included, and the SHA-256 of every file of theirs that
# may be installed; pip reads this file with `--require-hashes -c`. Made by launch/lock.sh: change it there, not here.
# Python 3.10 gets the last releases that still support it. torch's CUDA libraries are installed only by a torch that
# needs them.
HEADER
  # PyTorch's own builds for CPUs are the same version, from another index than the one that uv was asking.
  sed -n '/^[0-9a-f]\{64\} /s/ .*//p' launch/torch-cpu.sha256 | sed 's/^/    --hash=sha256:/; s/$/ \\/' |
    sed '/^torch==/r /dev/stdin' "$made" |
    awk '/^[a-z]/ { package = $1 } !seen[package, $0]++'  # uv keeps those of the file as it was
} >launch/constraints.txt
