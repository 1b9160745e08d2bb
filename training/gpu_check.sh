#!/bin/sh
# What a CUDA machine shows: kernels, gradients, losses, resuming, graphs, speed beside PyTorch, memory.
#
#   OUT=results training/gpu_check.sh [--only SECTION]... [--scale FACTOR]
#
# Needs Python 3.10+ with numba-cuda, cupy and (for the comparison) torch; nothing of this project is compiled or
# installed. Sections run in order of worth, each with a time limit and under 8 minutes in all. JSON lines go to stdout and,
# as they come, to $OUT/gpu_check.jsonl. Exit code 0: every section ran and all is well.
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd) || exit 1
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
export NUMBA_CUDA_LOW_OCCUPANCY_WARNINGS=0
[ -n "${CUDA_HOME:-}" ] || [ ! -d /usr/local/cuda ] || export CUDA_HOME=/usr/local/cuda
unset NUMBA_ENABLE_CUDASIM
exec "${PYTHON:-python3}" -m pyengine_training.gpu_check "$@"
