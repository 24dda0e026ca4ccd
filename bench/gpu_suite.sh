#!/usr/bin/env bash
# GPU tests, kernel benchmarks, profiles and tuning in one call of under nine minutes; leaves JSON.
#   bench/gpu_suite.sh [OUT]
# PYTHON names the interpreter. Exits 0 when every step did, 1 when one failed, 2 without a GPU.
set -u
cd "$(dirname "$0")/.."
out="${1:-bench/results/gpu}"
mkdir -p "$out"
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
python="${PYTHON:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
status=0

# step NAME SECONDS COMMAND...: run with a limit, keep the log, go on after a failure.
step() {
  local name="$1" limit="$2" began=$SECONDS code=0
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
  printf '{"step": "%s", "exit": %d, "seconds": %d}\n' "$name" "$code" "$((SECONDS - began))" \
    | tee -a "$out/steps.jsonl"
  [ "$code" -eq 0 ] || status=1
}

: >"$out/steps.jsonl"
"$python" -c '
import json, sys, torch, triton
p = torch.cuda.get_device_properties(0)
json.dump({"device": p.name, "memory": p.total_memory, "torch": torch.__version__,
           "triton": triton.__version__}, open(sys.argv[1], "w"))' "$out/device.json" \
  2>"$out/device.log" || { echo "no CUDA device for PyTorch and Triton: $out/device.log" >&2; exit 2; }
arch="$("$python" -c 'import torch; print("sm_%d%d" % torch.cuda.get_device_capability())')"

step tests 130 "$python" -m pytest -q -m gpu tests/kernels
step aot 90 "$python" -m kernels.aot --arch "$arch" --out "$out/cubin" --table "$out/aot.md"
step bench 140 "$python" -m bench kernels --device cuda --repeats 30 --json "$out/kernels.json"
step profile 40 "$python" -m bench profile_kernels --device cuda --json "$out/profile.json" \
  --traces "$out/traces"
step tune 80 "$python" -m kernels.tune --write
step bench_tuned 40 "$python" -m bench kernels --device cuda --repeats 20 \
  --op mask_attention gated_cross_attention --json "$out/kernels_tuned.json"
mkdir -p "$out/tuning"
for operator in codebook_lookup gated_cross_attention mask_attention; do
  for table in kernels/"$operator"/tuning/*.json; do
    [ -f "$table" ] && cp "$table" "$out/tuning/$operator-$(basename "$table")"
  done
done
exit "$status"
