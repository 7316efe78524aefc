#!/usr/bin/env bash
# The XAttention paper's RULER table at stride 8 and 16 with tau 0.9, dense beside sparse, on
# lm-evaluation-harness (pip install 'lm_eval[ruler]'). Options come after these and win; the same
# command resumes a run.
#
#   scripts/run_ruler.sh --run runs/ruler                   # needs the hub
#   scripts/run_ruler.sh --run runs/small --model runs/language --lengths 8192,16384
set -euo pipefail

exec python -m eval_language.ruler --model meta-llama/Llama-3.1-8B-Instruct \
    --lengths 4096,8192,16384,32768,65536,131072 --settings 0.9:8,0.9:16 "$@"
