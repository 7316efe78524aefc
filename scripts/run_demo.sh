#!/usr/bin/env bash
# A long prompt in chunks: seconds, memory, density by layer, and the hidden text that is asked for.
# By default, the small model that ships with the package, with its first two layers dense; it needs
# no hub. With --paper as the first option, the XAttention authors' demo: their model, length and
# stride. Options come after these and override them.
#
#   scripts/run_demo.sh --compare dense
#   scripts/run_demo.sh --model random:qwen2.5-7b --tokens 1048576 --density 0.07
#   scripts/run_demo.sh --paper                             # needs the hub and an 80 GB card
#   scripts/run_demo.sh --paper --plan                      # prints the memory that it needs
set -euo pipefail

words=(--model demo --dense-layers 2 --chunk-size 32768 --stride 16)
if [[ ${1-} == --paper ]]; then
    shift
    words=(--model gradientai/Llama-3-8B-Instruct-Gradient-1048k --tokens 450560
        --chunk-size 32768 --stride 16)
fi
if [[ " $* " =~ " "(-h|--help)" " ]]; then
    echo "Options of this script, instead of the defaults below: ${words[*]}"
fi
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
exec python -m xattn_video prefill "${words[@]}" "$@"
