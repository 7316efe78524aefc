#!/usr/bin/env bash
# RULER at stride 8 and 16 with tau 0.9, dense beside sparse, on lm-evaluation-harness (pip install
# 'lm_eval[ruler]'). By itself, the small model that ships with the package, at 8k, 16k and 32k
# tokens, which needs no hub; with --paper as the first option, the model and the lengths of the
# XAttention paper's table. Options come after these and win; the same command resumes a run.
#
#   scripts/run_ruler.sh --run runs/ruler
#   scripts/run_ruler.sh --run runs/few --lengths 2048 --samples 4      # minutes on a CPU
#   scripts/run_ruler.sh --paper --run runs/paper           # needs the hub
set -euo pipefail

words=(--model demo --lengths 8192,16384,32768)
if [[ ${1-} == --paper ]]; then
    shift
    words=(--model meta-llama/Llama-3.1-8B-Instruct --lengths 4096,8192,16384,32768,65536,131072)
fi
exec python -m eval_language.ruler "${words[@]}" --settings 0.9:8,0.9:16 "$@"
