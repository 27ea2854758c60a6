#!/usr/bin/env bash
# The compact model on the bundled pictures, then the method on them, on the CPU: train the baseline on with the channel
# and xor losses, cut the channels that went off, stylise a pair with the full and the pruned network. Called by
# `make demo`.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
rm -rf demo # only ever written by this script

"$python" main.py --mode test --gpu_no -1 --content imgs/content --style imgs/style --imsize 256 --save_path demo/compact
echo "demo/compact/contact_sheet.png shows the bundled photographs in the styles of the bundled paintings"

"$python" main.py --mode train --gpu_no -1 --vgg_weights bundled --load_path model-store/baseline.pth \
    --imsize 128 --cropsize 64 --batch_size 4 --content_dir imgs/content --style_dir imgs/style --encoder_lr 2e-5 \
    --decoder_lr 1e-4 --warmup_iter 10 --decay_iter 20 --style_loss_weight 50 --uncorrelation_loss_weight 0 \
    --channel_loss_weight 500 --xor_loss_weight 100 --l0_eps 1e-3 --max_iter 60 --check_iter 30 --keep_checkpoints 0 \
    --wb_mode disabled --save_path demo/ch_xor
"$python" main.py --mode prune --gpu_no -1 --load_path demo/ch_xor --content_dir imgs/content --style_dir imgs/style \
    --imsize 256 --cropsize 256 --report_size 256 --latency_runs 5 --save_path demo/pruned
for model in ch_xor pruned; do
    "$python" main.py --mode test --gpu_no -1 --load_path demo/$model --content imgs/content/brandenburg_gate.jpg \
        --style imgs/style/starry_night.jpg --save_path demo/brandenburg_gate_starry_night_$model.png
done
cat <<'TEXT'

The pictures are in demo/:
  compact/contact_sheet.png                  bundled photographs and paintings, by model-store/compact.pth
  brandenburg_gate_starry_night_ch_xor.png   by the network that was trained just now, from the baseline on
  brandenburg_gate_starry_night_pruned.png   by the same without the channels that went off: the same picture
  pruned/l0_map.png                          which channels are off (black) for which picture
  pruned/prune_grid.png                      what cutting more and more channels does
  ch_xor/samples/                            content, style and output during training
TEXT
