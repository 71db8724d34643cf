#!/usr/bin/env bash
# The bench on a GPU: one call, under nine minutes; the same call again goes on where it stopped. See benchmarks/gpu.py --help.
#   benchmarks/gpu.sh               on a GPU; results in $OUT if set, else benchmarks/results
#   benchmarks/gpu.sh --rehearse    every section on this CPU, on tiny shapes
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -W ignore benchmarks/gpu.py ${OUT:+--out "$OUT"} "$@"
