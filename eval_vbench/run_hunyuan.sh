#!/usr/bin/env bash
# The XAttention paper's HunyuanVideo table, start to finish: dense, tau 0.90 and tau 0.95 at stride
# 8 with 5 dense steps of 50, 720x1280, 129 frames, VBench's GPT-enhanced prompts, one seed.
# The flow shift of 7 is the checkpoint's own; the report checks it.
#
# xattn-run-hunyuan, or in a clone scripts/run_hunyuan.sh:
#
#   scripts/run_hunyuan.sh [--plan] [--gpus N] [--num-prompts N] [--vbench-python PYTHON] RUNS \
#       [-- options of eval_vbench.generate that come last and win]
#
# --plan prints the expected cost and stops. The same command resumes what was interrupted.
set -euo pipefail

usage() {
    sed -n '2,12s/^# \{0,1\}//p' "$0"
}

refuse() {
    echo "error: $1" >&2
    usage >&2
    exit 2
}

plan=no gpus=1 suite=gpt_enhanced num_prompts="" videos_per_prompt=1 vbench_python="" runs=""
while [[ $# -gt 0 ]]; do
    case $1 in
        --plan) plan=yes; shift ;;
        --gpus) gpus=${2:?--gpus takes a number}; shift 2 ;;
        --num-prompts) num_prompts=${2:?--num-prompts takes a number}; shift 2 ;;
        --vbench-python) vbench_python=${2:?--vbench-python takes a path}; shift 2 ;;
        --) shift; break ;;
        -h | --help) usage; exit ;;
        -*) refuse "unknown option $1" ;;
        *) [[ -z $runs ]] || refuse "give one folder for the runs, got $runs and $1"; runs=$1; shift ;;
    esac
done
[[ -n $runs ]] || refuse "give a folder for the runs"

# The options after -- that decide the number of videos; each may have its value in the next word.
name="" of=""
for word in "$@"; do
    if [[ $word == -* ]]; then
        name=${word%%=*}
    fi
    case $name in
        --suite) suite=${word#*=} ;;
        --num-prompts) num_prompts=${word#*=} ;;
        --videos-per-prompt) videos_per_prompt=${word#*=} ;;
        *) of=", not of all options after --" ;;
    esac
done
all_prompts=944
if [[ $suite == demo ]]; then
    all_prompts=40
fi
num_prompts=${num_prompts:-$all_prompts}
for number in "$gpus" "$num_prompts" "$videos_per_prompt"; do
    [[ $number =~ ^[1-9][0-9]*$ ]] || refuse "not a positive number: $number"
done
((num_prompts <= all_prompts)) || refuse "the suite has $all_prompts prompts, got $num_prompts"
videos=$((num_prompts * videos_per_prompt))

# Seconds on one H100 for one video, measured on random weights with flash-attn-4. Steps, scoring
# included (benchmarks/results/step-h100.json): dense 18.53 s, sparse 11.06 s at density 0.445 and
# 9.31 s at 0.336, near the paper's densities at tau 0.95 and 0.90. Text, decoding and moving the
# weights: 60 s (docs/benchmarks.md, whole videos). A lossless copy takes about 0.15 GiB, a guess.
other=60
dense=$((50 * 1853 / 100 + other))
tau_95=$((5 * 1853 / 100 + 45 * 1106 / 100 + other))
tau_90=$((5 * 1853 / 100 + 45 * 931 / 100 + other))
total=$(((dense + tau_95 + tau_90) * videos))
cat <<COST
expected   $videos videos x 3 runs; on an H100 about $dense s for a dense video,
           $tau_95 s at tau 0.95, $tau_90 s at tau 0.90 (an estimate from measured steps$of)
time       about $((total / 3600)) GPU hours, $((total / 3600 / gpus)) hours on $gpus GPU(s)
disk       about $((videos * 3 * 16 / 100)) GiB in $runs, nearly all of it lossless copies
scoring    not estimated: VBench's dimensions need weights and a GPU
COST
if [[ $plan == yes ]]; then
    exit 0
fi

# In a clone that is not installed, eval_vbench is found beside this script.
PYTHONPATH="$(dirname "$(dirname "$(realpath "$0")")")${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
launch=(python)
if ((gpus > 1)); then
    launch=(accelerate launch --multi_gpu --num_machines 1 --mixed_precision no
        --dynamo_backend no --num_processes "$gpus")
fi

generate() {
    "${launch[@]}" -m eval_vbench.generate --num-prompts "$num_prompts" \
        --suite "$suite" --videos-per-prompt "$videos_per_prompt" --seed 0 \
        --height 720 --width 1280 --num-frames 129 --num-inference-steps 50 "$@"
}

sparse=(--stride 8 --block-size 128 --warmup-steps 5 --cooldown-steps 0)
generate --run "$runs/dense" --dense "$@"
for tau in 0.90 0.95; do
    generate --run "$runs/xattn-$tau" --threshold "$tau" "${sparse[@]}" "$@"
done

if [[ -n $vbench_python ]]; then
    for name in dense xattn-0.90 xattn-0.95; do
        python -m eval_vbench.score --run "$runs/$name" --vbench-python "$vbench_python" \
            --skip-missing
    done
fi

device=$(python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
python -m eval_vbench.report --dense "$runs/dense" \
    --sparse "$runs/xattn-0.90" --sparse "$runs/xattn-0.95" \
    --output "$runs/report" --device "$device"
