#!/usr/bin/env bash
# The commands of docs/pointcloud-guide.md in order.
#   bash pointcloud_walk.sh MESHES [FOLDER]
# MESHES holds one mesh per class (.obj .off .stl .ply); everything is written to FOLDER (by default ./walk).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
meshes=$(cd "${1:?usage: pointcloud_walk.sh MESHES [FOLDER]}" && pwd)
mkdir -p "${2:-walk}"
cd "${2:-walk}"
ln -sfn "$meshes" cad

run() { printf '\n$ %s\n' "$*"; "$@"; }
refused() { # the command must fail, and says why
    printf '\n$ %s\n' "$*"
    if "$@"; then echo "This should have been refused." >&2; exit 1; fi
}

# ---- a CAD folder: one mesh per class
run python "$here/pointcloud_data.py" scans --meshes cad --out scans
run peft-suite pointcloud view cad/cow.obj scans/cow.ply --out look.html --no-window
run peft-suite pointcloud plan --backbone micro-points --data cad --method lora
run peft-suite pointcloud train --backbone micro-points --data cad --method lora --shots 20 --epochs 20 --lr 0.01 \
    data.views.noise=[0.02,0.02] data.views.occlusion=[0.3,0.3] --out runs/cad --overwrite
run peft-suite pointcloud eval runs/cad/adapter
run peft-suite pointcloud predict runs/cad/adapter scans --out predictions.csv
run head -4 predictions.csv
run peft-suite pointcloud view scans/cow.ply scans/teapot.ply --adapter runs/cad/adapter --show classes --show attention \
    --out predicted.html --no-window
run peft-suite pointcloud merge runs/cad/adapter
run peft-suite pointcloud eval runs/cad/merged
run peft-suite pointcloud export runs/cad/adapter exported
run peft-suite pointcloud export runs/cad/adapter exported-peft --format peft
run python "$here/pointcloud_deploy.py" runs/cad/merged scans

# ---- a LiDAR folder: .bin, .las and .pcd, z up, two files that no one can use
run python "$here/pointcloud_data.py" lidar --out lidar --broken
run peft-suite pointcloud view lidar/test/chair --up z --out lidar.html --no-window
refused peft-suite pointcloud train --backbone micro-points --data lidar --method pointgst --out runs/lidar data.up=z
run peft-suite pointcloud train --backbone micro-points --data lidar --method pointgst --epochs 30 --lr 0.005 \
    data.up=z data.augment=rotate+jitter --skip-bad --out runs/lidar --overwrite
run peft-suite pointcloud eval runs/lidar/adapter
run peft-suite pointcloud predict runs/lidar/adapter lidar/test/lamp --top 2
refused peft-suite pointcloud merge runs/lidar/adapter
run peft-suite pointcloud export runs/lidar/adapter exported-lidar
