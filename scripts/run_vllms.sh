#!/usr/bin/env bash
# The XAttention paper's Video-MME table: Qwen2-VL-7B, stride 16, tau 0.9, the first three layers
# dense as in the authors' code, dense beside sparse, on lmms-eval (pip install lmms-eval, in an
# environment that has torchvision). Videos and weights are on the hub, hundreds of GB. Options come
# after these and win; the same command resumes a run.
#
#   scripts/run_vllms.sh --run runs/videomme
set -euo pipefail

words=(--model Qwen/Qwen2-VL-7B-Instruct --settings 0.9:16 --dense-layers 3 --samples 2700)
if [[ " $* " =~ " "(-h|--help)" " ]]; then
    echo "Options of this script, instead of the defaults below: ${words[*]}"
fi
exec python -m eval_language.videomme "${words[@]}" "$@"
