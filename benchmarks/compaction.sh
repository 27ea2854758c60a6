#!/usr/bin/env bash
# Ways to a smaller network, each at several budgets of multiply-adds and with as many iterations:
#   compaction  the baseline, trained with the channel and xor losses in every layer towards the budget, cut to it, then
#               trained on without them
#   magnitude   the baseline, cut to the budget by the filters' l1 norms, then learning from the baseline (--teacher)
#   narrow      new weights of the widths of compaction, learning from the baseline
# At last, each is trained for a while on larger crops.
#
#   bash benchmarks/compaction.sh BASELINE PHOTOS PAINTINGS OUT [WAY_BUDGET ...]
#
# BASELINE: a model file, or the folder of a run, of full width. OUT gets a run folder WAY_BUDGET for each network, and
# `steps` with what comes before. Without names, all of the comparison in docs/compact.md; what is there already is not made
# again, and a run that was interrupted wants its folder removed. In the environment: STYLE_WEIGHT is the style loss's
# weight, and should be the baseline's (50); LEARN_ITER and TRAIN_ITER are the iterations of each network, the last on
# larger crops (300 and 40).
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 4 ]; then
    echo "error: got $# arguments; BASELINE PHOTOS PAINTINGS OUT [WAY_BUDGET ...] are needed" >&2
    exit 2
fi
baseline=$1 photos=$2 paintings=$3 out=$4
shift 4
style_weight=${STYLE_WEIGHT:-50}
learn_iter=${LEARN_ITER:-300} train_iter=${TRAIN_ITER:-40} # of compaction, half of the first is with the losses
main=("${PYTHON:-python3}" main.py --gpu_no -1)
pictures=(--content_dir "$photos" --style_dir "$paintings" --holdout 0.1 --num_workers 1)
training=(--mode train --vgg_weights bundled "${pictures[@]}" --style_loss_weight "$style_weight"
    --uncorrelation_loss_weight 0 --wb_mode disabled --keep_checkpoints 0 --check_iter 10)
crops=(--imsize 128 --cropsize 64 --batch_size 4) large_crops=(--imsize 256 --cropsize 128 --batch_size 2)

# cut MODEL BUDGET RANK OUT: channels are chosen by the bundled pictures, none learned from and none measured on.
cut() {
    "${main[@]}" --mode prune --load_path "$1" --prune_macs "$2" --prune_rank "$3" --content_dir imgs/content \
        --style_dir imgs/style --imsize 128 --cropsize 128 --latency_runs 1 --prune_nums 0 --save_path "$4"
}

compaction() { # BUDGET
    local folder=$out/steps/compaction_$1
    if [ -e "$folder/cut/pruned.pth" ]; then return; fi
    "${main[@]}" "${training[@]}" --load_path "$baseline" "${crops[@]}" --lr 8e-5 --warmup_iter 15 \
        --max_iter $((learn_iter / 2)) --compact_layers all --compact_cost macs --target_macs "$1" \
        --l0_eps relative:0.1 --channel_loss_weight 3 --xor_loss_weight 1 --save_path "$folder/compacted"
    cut "$folder/compacted" "$1" importance "$folder/cut"
}

magnitude() { # BUDGET
    local folder=$out/steps/magnitude_$1/cut
    if [ ! -e "$folder/pruned.pth" ]; then cut "$baseline" "$1" magnitude "$folder"; fi
}

go_on() { # NAME
    local folder=$out/steps/$1
    if [ ! -e "$folder/recovered/check_point.pth" ]; then
        "${main[@]}" "${training[@]}" --load_path "$folder/cut" "${crops[@]}" --lr 8e-5 --warmup_iter 15 \
            --max_iter $((learn_iter / 2)) --channel_loss_weight 0 --xor_loss_weight 0 --save_path "$folder/recovered"
    fi
    finish "$1" "$folder/recovered"
}

learn() { # NAME CUT [FLAG]
    local student=$out/steps/$1/student
    if [ ! -e "$student/student.pth" ]; then
        "${main[@]}" --mode distill --teacher "$baseline" --load_path "$2" "${@:3}" "${pictures[@]}" --imsize 192 \
            --cropsize 64 --batch_size 4 --lr 2e-3 --max_iter "$learn_iter" \
            --check_iter "$learn_iter" --save_path "$student"
    fi
    finish "$1" "$student/student.pth"
}

finish() { # NAME START
    "${main[@]}" "${training[@]}" --load_path "$2" "${large_crops[@]}" --lr 1e-4 --warmup_iter 10 \
        --decay_iter $((train_iter / 2)) --max_iter "$train_iter" --channel_loss_weight 0 --xor_loss_weight 0 \
        --save_path "$out/$1"
}

names=("$@")
if [ $# -eq 0 ]; then names=({compaction,magnitude,narrow}_{0.5,0.2,0.1,0.05}); fi
for name in "${names[@]}"; do
    budget=${name#*_}
    if [ -e "$out/$name/check_point.pth" ]; then continue; fi
    case $name in
        compaction_*) compaction "$budget"; go_on "$name" ;;
        magnitude_*) magnitude "$budget"; learn "$name" "$out/steps/$name/cut" ;;
        narrow_*) compaction "$budget"; learn "$name" "$out/steps/compaction_$budget/cut" --new_weights ;;
        *) echo "error: $name: compaction_BUDGET, magnitude_BUDGET or narrow_BUDGET is needed" >&2; exit 2 ;;
    esac
done
