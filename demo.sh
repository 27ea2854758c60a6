#!/usr/bin/env bash
# The compact model on the bundled pictures, then the finding of the papers on them, on the CPU: the channels of the
# shipped ch_xor network that are off for every picture are cut out, and it paints the same picture with and without
# them. Called by `make demo`.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
rm -rf demo # only ever written by this script

"$python" main.py --mode test --gpu_no -1 --content imgs/content --style imgs/style --imsize 256 --save_path demo/compact
echo "demo/compact/contact_sheet.png shows the bundled photographs in the styles of the bundled paintings"

"$python" main.py --mode prune --gpu_no -1 --load_path model-store/ch_xor.pth --content_dir imgs/content \
    --style_dir imgs/style --imsize 256 --cropsize 256 --prune_nums 0 200 300 350 400 --report_size 256 \
    --latency_runs 5 --save_path demo/pruned
"$python" main.py --mode test --gpu_no -1 --load_path model-store/ch_xor.pth demo/pruned \
    --content imgs/content/brandenburg_gate.jpg --style imgs/style/starry_night.jpg --save_path demo/same_picture
cat <<'TEXT'

The pictures are in demo/:
  compact/contact_sheet.png     bundled photographs and paintings, by model-store/compact.pth
  pruned/l0_map.png             which channels of model-store/ch_xor.pth are off (black) for which picture
  pruned/prune_grid.png         what cutting more and more channels does
  same_picture/comparison.png   by ch_xor, and by the same without the channels that are off: the same picture
TEXT
