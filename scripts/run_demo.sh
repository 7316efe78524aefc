#!/usr/bin/env bash
# The XAttention authors' demo: a long prompt through Llama 3 8B with a context of a million tokens,
# with their length and stride. Options come after these and win.
#
#   scripts/run_demo.sh                                     # needs the hub and an 80 GB card
#   scripts/run_demo.sh --model random:qwen2.5-7b --tokens 1048576 --density 0.07   # needs no hub
#   scripts/run_demo.sh --plan                              # prints the memory that it needs
set -euo pipefail

export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
exec python -m xattn_video prefill --model gradientai/Llama-3-8B-Instruct-Gradient-1048k \
    --tokens 450560 --chunk-size 32768 --stride 16 "$@"
