#!/usr/bin/env bash
# The commands of docs/audio-guide.md in order.
#   bash audio_walk.sh FSDD [FOLDER]
# FSDD is the Free Spoken Digit Dataset (github.com/Jakobovski/free-spoken-digit-dataset); everything is written to
# FOLDER (by default ./walk).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
fsdd=$(cd "${1:?usage: audio_walk.sh FSDD [FOLDER]}" && pwd)
mkdir -p "${2:-walk}"
cd "${2:-walk}"
ln -sfn "$fsdd" fsdd

run() { printf '\n$ %s\n' "$*"; "$@"; }
refused() { # the command must fail, and says why
    printf '\n$ %s\n' "$*"
    if "$@"; then echo "This should have been refused." >&2; exit 1; fi
}

# ---- a folder per class
run python "$here/audio_data.py" fsdd --out .
run peft-suite audio plan --backbone micro-ast --data words --method lora
run peft-suite audio train --backbone micro-ast --data words --method lora --shots 60 --epochs 20 --lr 0.01 \
    "data.augment=spec-augment(freq=8, time=12)" --out runs/words --overwrite
run peft-suite audio eval runs/words/adapter
run peft-suite audio predict runs/words/adapter words/test --out predictions.csv
run head -4 predictions.csv
run peft-suite audio predict runs/words/adapter long.flac --hop 0.25 --out long-predicted.csv
run head -8 long-predicted.csv
run head -4 long.csv
run peft-suite audio merge runs/words/adapter
run peft-suite audio eval runs/words/merged
run peft-suite audio export runs/words/adapter exported --format torch-export
run python "$here/audio_deploy.py" runs/words/merged words/test/two

# ---- broken files
run python "$here/audio_data.py" fsdd --out . --broken
refused peft-suite audio train --backbone micro-ast --data words --method conformer --out runs/bad
run peft-suite audio train --backbone micro-ast --data words --method "conformer(kernel=7)" --shots 60 --epochs 20 \
    --lr 0.01 --skip-bad --out runs/conformer --overwrite
refused peft-suite audio merge runs/conformer/adapter
run peft-suite audio export runs/conformer/adapter exported-conformer --format torch-export
run python "$here/audio_deploy.py" runs/conformer/adapter words/test/two

# ---- a data set of the field, as it lies on the disk
run peft-suite audio train --backbone micro-ast --data fsdd --method ast-pfeiffer --shots 5 --epochs 20 --lr 0.01 \
    data.cache=cache --out runs/digits --overwrite
run peft-suite audio crossval --backbone micro-ast --data fsdd --methods linear,lora --over speaker \
    --folds jackson,theo --shots 5 --epochs 10 --lr 0.01 recipe.eval_every=10 data.cache=cache --out runs/speakers
