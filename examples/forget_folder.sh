#!/usr/bin/env bash
# Forgets listed pictures of a folder: a checkpoint, a folder of class folders and a list in, a checkpoint and its papers out.
#   examples/forget_folder.sh MODEL WEIGHTS DATA LIST OUTPUT [more options of `deepclean-hooks forget`]
#   examples/forget_folder.sh timm:resnet18 resnet18.pth photos delete.txt unlearned --test photos-test
# Run it again after a kill: it goes on. It ends with 0 only if the report fits both checkpoints.
set -euo pipefail
model=$1 weights=$2 data=$3 list=$4 output=$5
shift 5
program="${PYTHON:-python3} -m deepclean_hooks"

$program forget --model "$model" --weights "$weights" --data "$data" --forget "$list" --output "$output" "$@"
$program verify "$output/report.json" "$output/$(basename "$weights")" --original "$weights"
