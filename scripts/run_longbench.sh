#!/usr/bin/env bash
# The XAttention paper's LongBench table at stride 8 with tau 0.9, and the retrieval tasks that it
# leaves out, dense beside sparse, on lm-evaluation-harness (pip install 'lm_eval[longbench]'). The
# data are on the hub. Options come after these and win; the same command resumes a run.
#
#   scripts/run_longbench.sh --run runs/longbench
set -euo pipefail

words=(--model meta-llama/Llama-3.1-8B-Instruct --settings 0.9:8 --samples 500)
if [[ " $* " =~ " "(-h|--help)" " ]]; then
    echo "Options of this script, instead of the defaults below: ${words[*]}"
fi
exec python -m eval_language.longbench "${words[@]}" "$@"
