#!/usr/bin/env bash
# The paper in one command: from photographs and paintings to trained, pruned, narrow and compared networks.
#
#   bash speedrun.sh CONTENT STYLE [OUT]
#
# CONTENT, STYLE: folders or .zip archives of pictures; a part of each is held out and measured on. OUT (default:
# runs/speedrun) gets a folder for every network and report.md. Run again, it goes on where it was interrupted: what is
# whole is not made again. In the environment:
#   SCALE=small  few iterations on small pictures: minutes on a CPU; shows how it all works, not how well
#   TIME=20m     as many iterations as fit (s, m or h), by the rate that each training's first stretch shows
#   ITERATIONS=N of each training, at most (default: 80000)
#   HOLDOUT=N    --holdout (default: 0.1)
#   GPU=N        --gpu_no (-1: the CPU)
#   VGG=SOURCE   --vgg_weights (default: bundled)
#   FLAGS="..."  more flags for every --mode train, for instance "--compile --num_workers 14 --cache_dir /fast/cache"
set -euo pipefail
export PYTHONUTF8=1  # the report has signs that not every locale has
started=$SECONDS

absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
die() { echo "error: $*" >&2; exit 2; }

[ $# -eq 2 ] || [ $# -eq 3 ] || die "got $# arguments; bash speedrun.sh CONTENT STYLE [OUT] is needed"
SCALE=${SCALE:-full} TIME=${TIME:-} ITERATIONS=${ITERATIONS:-}
GPU=${GPU:-} VGG=${VGG:-bundled} FLAGS=${FLAGS:-} py=${PYTHON:-python3}
case $py in /*) ;; */*) py=$PWD/$py ;; esac
[ ! -f "$VGG" ] || VGG=$(absolute "$VGG")
[[ $GPU =~ ^(-1|[0-9]*)$ ]] || die "GPU=$GPU: -1 for the CPU, or the number of a GPU, is needed"
[[ $TIME =~ ^([1-9][0-9]*[smh])?$ ]] || die "TIME=$TIME: a time as 90s, 20m or 2h is needed"
[[ $ITERATIONS =~ ^([1-9][0-9]*)?$ ]] || die "ITERATIONS=$ITERATIONS: a number is needed"
budget=${TIME%[smh]}
case $TIME in *m) budget=$((budget * 60)) ;; *h) budget=$((budget * 3600)) ;; esac
case $SCALE in
    full)
        holdout=${HOLDOUT:-0.1} probe=400 warmup=200 checks=40 iterations=80000
        rates=(1e-4 5e-6) # decoder, encoder
        crops=(--imsize 512 --cropsize 256 --batch_size 4)
        measured=(--imsize 512 --cropsize 512) pairs=100 pruned=(--prune_images 1000) latency=(--sizes 512 1024) ;;
    small) # rates as large as so few iterations need
        holdout=${HOLDOUT:-0.25} probe=4 warmup=2 checks=4 iterations=40
        rates=(1e-3 5e-5)
        crops=(--imsize 96 --cropsize 64 --batch_size 2)
        measured=(--imsize 96 --cropsize 96) pairs=6 pruned=(--latency_runs 3 --report_size 128)
        latency=(--sizes 128 --runs 3) ;;
    *) die "SCALE=$SCALE: full or small is needed" ;;
esac
if [ -n "$ITERATIONS" ]; then
    [ "$ITERATIONS" -ge $probe ] || die "ITERATIONS=$ITERATIONS: $probe or more are needed"
    iterations=$ITERATIONS
fi
if [ -n "$TIME" ] && [ "$SCALE" = full ]; then pairs=40 pruned=(--prune_images 200); fi

here=$(cd "$(dirname "$0")" && pwd)
content=$(absolute "$1") style=$(absolute "$2") out=$(absolute "${3:-$here/runs/speedrun}")
cd "$here"
# What can be refused is refused before anything is written; the pairs that the held-out pictures make are counted.
possible=$("$py" - "$content" "$style" "$out" "$holdout" <<'P'
import math, sys
from folders import find_measured, find_pictures
from utils import UserError
*folders, out, holdout = sys.argv[1:]
try:
    for name, folder in zip(("CONTENT", "STYLE"), folders):
        find_pictures(folder, name, out)
    print(math.prod(len(find_measured(*each, float(holdout))) for each in zip(folders, ("CONTENT", "STYLE"))))
except UserError as error:
    sys.exit(print(f"error: {error}".replace("--save_path", "OUT"), file=sys.stderr) or 2)
P
) || exit
[ "$possible" -ge "$pairs" ] || pairs=$possible
marks=$out/stages
mkdir -p "$marks" 2>/dev/null || die "OUT $out: the folder cannot be made"
settings=$(printf '%s\n' "CONTENT=$content" "STYLE=$style" "SCALE=$SCALE" "HOLDOUT=$holdout" "VGG=$VGG")
if [ -e "$marks/settings" ] && [ "$settings" != "$(cat "$marks/settings")" ]; then
    die "OUT $out: holds a run with other settings ($(paste -sd ' ' "$marks/settings")); choose another OUT"
fi
echo "$settings" > "$marks/settings"

# -------------------------------------------------------------------------------------------------- stages

main=("$py" main.py)
pictures=(--content_dir "$content" --style_dir "$style" --holdout "$holdout")
device=()
[ -z "$GPU" ] || device=(--gpu_no "$GPU")
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
failed=0 longest_measurement=-1 measurements_left=8 shares_left=20

# run NAME COMMAND...: with its output in NAME.log, too; its time is added to NAME.seconds.
run() {
    local name=$1 begin=$SECONDS code=0
    shift
    grep -qsx "$name" "$marks/order" || echo "$name" >> "$marks/order"
    "$@" 2>&1 | tee -ia "$marks/$name.log" || code=${PIPESTATUS[0]}
    echo $((SECONDS - begin + $(cat "$marks/$name.seconds" 2>/dev/null || echo 0))) > "$marks/$name.seconds"
    if [ $stopped -ne 0 ] || [ $code -ge 128 ]; then exit $((stopped ? stopped : code)); fi # the next call goes on
    return $code
}

# finish NAME COMMAND...: the marker of a stage that is whole.
finish() {
    local name=$1
    shift
    { echo "$commit"; printf '%q ' "python" "${@:2}" | sed 's/ $//'; echo; } > "$marks/$name.new"
    mv "$marks/$name.new" "$marks/$name.done"
    rm -f "$marks/$name.failed"
}

# learn NAME SHARE ITERATIONS DECAY FLAGS...: a training. SHARE: of the 20 parts that all have of the time; DECAY: per
# cent of the iterations in which the rates fall.
learn() {
    local name=$1 share=$2 target=$3 decay=$4 begin first fits="" command more=()
    shift 4
    if [ ! -e "$marks/$name.done" ]; then
        echo "== $name: learning"
        command=("${main[@]}" "$@" "${pictures[@]}" "${device[@]}" --keep_checkpoints 2 --resume auto
            --save_path "$out/$name")
        if [ -e "$marks/$name.iterations" ]; then
            target=$(cat "$marks/$name.iterations")
        elif [ -n "$budget" ]; then
            for first in $probe $((2 * probe)) $((3 * probe)); do # one that was interrupted has no rate
                begin=$SECONDS
                run "$name" "${command[@]}" --max_iter $first --check_iter $((probe / 2)) || exit $?
                fits=$("$py" benchmarks/fit.py "$out/$name" --done $first --every $((probe / 2)) --took \
                    $((SECONDS - begin)) --seconds $(($(time_left) * share / shares_left)) --checks $checks \
                    --most "$target" 2>/dev/null) && break
            done
            [ -n "$fits" ] || die "TIME=$TIME: the first stretches of $out/$name left no checks to tell its rate by"
            target=$fits
        fi
        echo "$target" > "$marks/$name.iterations"
        [ "$decay" -eq 0 ] || more=(--decay_iter $(((target - warmup) * decay / 100)))
        command+=("${more[@]}" --max_iter "$target" --check_iter $((target > checks ? target / checks : 1)))
        run "$name" "${command[@]}" || exit $?
        finish "$name" "${command[@]}"
    fi
    shares_left=$((shares_left - share))
}

# time_left: seconds that are left for trainings; what is to be measured takes as long as its longest piece so far.
time_left() {
    local piece=$((longest_measurement >= 0 ? longest_measurement : budget / 25)) # -1: nothing was measured yet
    echo $((budget - (SECONDS - started) - measurements_left * piece))
}

# measure NAME COMMAND...: anything else. What fails is named in the report, and the rest goes on.
measure() {
    local name=$1 begin=$SECONDS
    shift
    if [ ! -e "$marks/$name.done" ]; then
        echo "== $name"
        if run "$name" "$@"; then
            finish "$name" "$@"
        else
            touch "$marks/$name.failed"
            failed=1
        fi
        [ $((SECONDS - begin)) -le $longest_measurement ] || longest_measurement=$((SECONDS - begin))
    fi
    measurements_left=$((measurements_left - 1))
}

# published NAME SHARE ENCODER_RATE UNCORRELATION CHANNEL XOR: a training of the paper, and its pruning.
published() {
    learn "$1" "$2" $iterations 0 --mode train --vgg_weights "$VGG" "${crops[@]}" --encoder_lr "$3" --decoder_lr \
        "${rates[0]}" --style_loss_weight 100 --uncorrelation_loss_weight "$4" --channel_loss_weight "$5" \
        --xor_loss_weight "$6" --l0_eps 1e-5 --wb_mode disabled $FLAGS
    measure "$1_pruned" "${main[@]}" --mode prune --load_path "$out/$1" "${pictures[@]}" "${device[@]}" \
        "${measured[@]}" "${pruned[@]}" --save_path "$out/$1_pruned"
}

# narrow NAME FROM MULTIPLY_ADDS SHARE: widths of FROM, cut to a fraction of its multiply-adds; new weights that learn
# by the losses, with AdaIN on all levels.
narrow() {
    measure "$1_cut" "${main[@]}" --mode prune --load_path "$out/$2" --prune_macs "$3" --prune_rank magnitude \
        --content_dir imgs/content --style_dir imgs/style "${device[@]}" --imsize 32 --cropsize 32 --latency_runs 1 \
        --report_size 32 --prune_nums 0 --save_path "$out/$1_cut"
    [ -e "$marks/$1_cut.done" ] || exit 1
    learn "$1" "$4" $iterations 50 --mode train --vgg_weights "$VGG" --load_path "$out/$1_cut" --new_weights \
        --adain_levels 4 --pooling blur "${crops[@]}" --lr 1e-3 --optimizer muon --warmup_iter $warmup \
        --style_loss_weight 100 --uncorrelation_loss_weight 0 --channel_loss_weight 0 --xor_loss_weight 0 \
        --shift_loss_weight 15 --wb_mode disabled $FLAGS
}

trap '"$py" benchmarks/report.py "$out"' EXIT
stopped=0 # the program at work has got the signal, too, and saves
trap 'stopped=130' INT
trap 'stopped=143' TERM
published baseline 4 0 0 0 0
published uncorrelation 3 "${rates[1]}" 50 0 0
published ch_xor 6 "${rates[1]}" 0 10000 500
narrow compact baseline 0.064 4
narrow tiny compact_cut 0.152 3

models=()
for name in baseline uncorrelation ch_xor {baseline,uncorrelation,ch_xor}_pruned compact tiny; do
    if [ -e "$marks/$name.done" ]; then models+=("$out/$name"); fi
done
measure compared "${main[@]}" --mode test --load_path "${models[@]}" "${pictures[@]}" "${device[@]}" --pairs $pairs \
    "${measured[@]}" --metrics content style ssim --vgg_weights "$VGG" --save_path "$out/compared"
measure latency "$py" benchmarks/stylize.py "${models[@]}" "${device[@]}" "${latency[@]}"
measure curves "$py" benchmarks/plot_runs.py --runs "$out"/{baseline,uncorrelation,ch_xor,compact,tiny} --save_path \
    "$out/curves.png"
echo "$out/report.md has tables, figures, times and commands"
exit $failed
