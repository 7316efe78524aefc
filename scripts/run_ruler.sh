#!/usr/bin/env bash
# RULER with tau 0.9, dense and sparse in one table, on lm-evaluation-harness (pip install
# 'lm_eval[ruler]'). By default, the small model that ships with the package, at 8k, 16k and 32k
# tokens, with all layers sparse and with the first two dense; it needs no hub. With --paper as the
# first option, the model, lengths and strides of the XAttention paper's table. Options come after
# these and override them; the same command resumes a run.
#
#   scripts/run_ruler.sh --run runs/ruler
#   scripts/run_ruler.sh --run runs/few --lengths 2048 --samples 4      # minutes on a CPU
#   scripts/run_ruler.sh --paper --run runs/paper           # needs the hub
set -euo pipefail

words=(--model demo --lengths 8192,16384,32768 --settings 0.9:8,0.9:8:2)
if [[ ${1-} == --paper ]]; then
    shift
    words=(--model meta-llama/Llama-3.1-8B-Instruct --settings 0.9:8,0.9:16
        --lengths 4096,8192,16384,32768,65536,131072)
fi
if [[ " $* " =~ " "(-h|--help)" " ]]; then
    echo "Options of this script, instead of the defaults below: ${words[*]}"
fi
exec python -m eval_language.ruler "${words[@]}" "$@"
