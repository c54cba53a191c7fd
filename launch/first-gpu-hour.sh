#!/usr/bin/env bash
# What is worth knowing of a GPU first, in an hour:  OUT=DIRECTORY bash launch/first-gpu-hour.sh [PART ...]
#
# Without PART all are run, in the order of --list, each bounded in time; one that is done already is left alone, so the
# same command goes on where it was cut. Every part leaves PART.json and PART.log in OUT, and a line in parts.jsonl.
#
#   OUT                where results go
#   PEFTUNE_PYTHON     an interpreter with torch for CUDA, 2.11 or later (default: python3); no network is needed
#   PEFTUNE_WHEELS     a directory of wheels to take first, beside what that interpreter has; nothing of it is changed.
#                      `--wheels DIRECTORY`, on a machine with a network, fills one
#   PEFTUNE_REHEARSAL  anything: tiny shapes on the CPU, to see whether all of it runs
#
#   --list             the parts: name, seconds at most, command
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
xl=(--shape xl --targets all --batch 8 --documents 600 --gate-blocks 0 --rounds 3 --warmup 1 --ours run.fast=true)

say() { printf '==> %s\n' "$*" >&2; }

fail() {
  printf 'peftune: %s\n' "$*" >&2
  exit 2
}

# NAME SECONDS COMMAND: what must hold, then what it reaches, then beside others, then where it goes.
parts() {
  echo "holds 300 gpu holds"
  echo "repeat 150 gpu repeat"
  echo "gradients 180 train gradients --targets all"
  echo "b11-small 240 train gpu --peers= --rounds 3 --ours run.fast=true"
  echo "b11-all 240 train gpu --targets all --peers= --rounds 3 --ours run.fast=true"
  echo "b11-xl 330 train gpu --peers= ${xl[*]} --tokens 60000"
  echo "compiled 240 train compiled --targets all --documents 4000 --batch 32 --block 1024 --tokens 200000 --rounds 3"
  echo "peers 390 train gpu --rounds 3 --ours run.fast=true"
  echo "quantised-xl 360 train quantized ${xl[*]} --tokens 40000"
  echo "rows 420 gpu rows"
  echo "head 60 gpu head"
  echo "profile 90 gpu profile"
  echo "blocks 240 gpu blocks"
  echo "fleet 240 fleet speed --counts 2,8,64 --sizes 1024 --short 0 --precisions bf16 --commands= --most 70000 --tokens 60000"
  echo "plan 120 train plan --grid 12x768:bf16:1024:16,12x768:bf16:1024:32:recompute,48x1600:bf16:1024:2"
}

# For Python 3.12 on Linux, the versions that are tested; bitsandbytes without the libraries of other CUDAs, and deepspeed
# without compiled operators. What a machine with torch and Transformers is likely to have is not among them.
fill() {
  local name pins=() platforms=()
  for name in pydantic pydantic-core annotated-types typing-inspection datasets dill multiprocess trl hjson bitsandbytes; do
    pins+=("$(pin "$name")")
  done
  for name in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014; do
    platforms+=(--platform "${name}_x86_64")
  done
  "$python" -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
    --dest "$1" "${pins[@]}" || exit 2
  DS_BUILD_OPS=0 "$python" -m pip wheel --no-deps --wheel-dir "$1" "$(pin deepspeed)" || exit 2
  "$python" - "$1" <<'PYTHON'
import pathlib, re, sys, zipfile
for path in pathlib.Path(sys.argv[1]).glob("bitsandbytes-*.whl"):
    slim = path.with_suffix(".part")
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(slim, "w", zipfile.ZIP_DEFLATED) as kept:
        for item in whole.infolist():
            if not re.search(r"libbitsandbytes_(?!cpu|cuda130)\w+\.so$", item.filename):
                kept.writestr(item, whole.read(item))
    slim.replace(path)
PYTHON
}

pin() { sed -n "s/^\($1==[^ ;]*\).*/\1/p" "$root/launch/constraints.txt" | tail -n 1; }

python=${PEFTUNE_PYTHON:-python3}
case ${1:-} in
-h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}" && exit ;;
--list) parts && exit ;;
--wheels) fill "${2:?--wheels needs a directory}" && exit ;;
esac
[[ -n ${OUT:-} ]] || fail "OUT is missing: a directory for the results; bash launch/first-gpu-hour.sh --help"
mkdir -p "$OUT" || fail "OUT is $OUT, which cannot be made"
OUT=$(cd "$OUT" && pwd)
command -v "$python" >/dev/null || fail "PEFTUNE_PYTHON is $python, which is not a program"
for wanted in "$@"; do
  parts | grep -q "^$wanted " || fail "no part $wanted; there are: $(parts | cut -d' ' -f1 | tr '\n' ' ')"
done

# Not in OUT, which is brought home, and is not to hold an environment or models.
work=${TMPDIR:-/tmp}/peftune-first-gpu-hour-$(id -u)
mkdir -p "$work"
if [[ -n ${PEFTUNE_WHEELS:-} ]]; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$work/site" \
    "$PEFTUNE_WHEELS"/*.whl >&2 || fail "the wheels in $PEFTUNE_WHEELS cannot be installed, see above"
fi
export PYTHONPATH=$root:$work/site HF_HUB_OFFLINE=1 PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
more=()
if [[ -n ${PEFTUNE_REHEARSAL:-} ]]; then more=(--quick --device cpu --rounds 1); fi

# part NAME SECONDS MODULE COMMAND [OPTION ...]
part() {
  local name=$1 seconds=$2 module=$3 began=$SECONDS code=0 options=("${@:4}")
  if ((${#more[@]})); then # not its sizes, which would win over those of --quick
    mapfile -t options < <(printf '%s\n' "${options[@]}" | sed -n '1p; /=$/p; /^--\(ours\|gate-blocks\)$/{N;p}')
    seconds=$((10 * seconds)) # a machine without a GPU may be slow or busy
  fi
  if [[ -s $OUT/$name.json ]]; then
    say "$name: done already"
    return
  fi
  say "$name: at most $seconds s"
  (cd "$root" && timeout --signal=INT --kill-after=20 "$seconds" "$python" -m "benchmarks.$module" "${options[@]}" "${more[@]}" \
    --work "$work/$name" --json "$OUT/$name.part") >"$OUT/$name.log" 2>&1 || code=$?
  if [[ -s $OUT/$name.part ]]; then mv "$OUT/$name.part" "$OUT/$name.json"; fi
  printf '{"part": "%s", "command": "benchmarks.%s %s", "exit_code": %d, "seconds": %d}\n' \
    "$name" "$module" "${options[*]} ${more[*]}" "$code" "$((SECONDS - began))" >>"$OUT/parts.jsonl"
  if ((code)); then say "$name: ended with $code after $((SECONDS - began)) s: $(tail -n 1 "$OUT/$name.log" | cut -c1-300)"; fi
}

failed=0
while read -r name seconds module command; do
  if (($#)) && [[ " $* " != *" $name "* ]]; then continue; fi
  # shellcheck disable=SC2086  # options of one word each
  part "$name" "$seconds" "$module" $command </dev/null
  [[ -s $OUT/$name.json ]] || failed=$((failed + 1))
done < <(parts)
say "$failed parts without a result; everything is in $OUT"
exit $((failed > 0))
