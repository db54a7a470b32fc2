#!/usr/bin/env bash
# What this code does on a GPU: ceilings, tests, kernels, capture, training, streaming; a table, and JSON beside.
# docs/gpu.md says what each row means.   benchmarks/gpu.sh [--small] [--json FILE] [--only SECTION,...] [--logs DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
