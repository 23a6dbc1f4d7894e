#!/usr/bin/env bash
# All that a card has to show, in one go: tests/test_gpu.py, scale.benchmark, and a real LLM that learns real
# pictures. Needs torch 2.11 or newer and the other packages of requirements.txt, and no network.
#
#   LLM=FOLDER DATA="train-*.tar" VAL=val.tar scale/gpu.sh        about eight minutes on an H100
#   scale/gpu.sh --device cpu --quick                             through every part, on a CPU
#   scale/gpu.sh tests benchmark                                  some of tests, benchmark, real
#
# LLM is a Hugging Face folder (scale/README.md says which kinds); DATA and VAL are pictures of 64 x 64 pixels or
# more with captions. Without them the last part is left out, or with --quick takes a tiny LLM and noise.
# Results: OUT, by default scale/results/CARD. LEARN (120) is how many seconds the LLM learns. A part that fails or
# runs out of its time does not stop the others.
set -u
cd "$(dirname "$0")/.."
DEVICE=cuda QUICK= PARTS=
while [ $# -gt 0 ]; do
    case $1 in
        --device) DEVICE=$2; shift 2 ;;
        --quick) QUICK=--quick; shift ;;
        tests|benchmark|real) PARTS="$PARTS $1"; shift ;;
        *) echo "usage: scale/gpu.sh [--device cuda|cpu] [--quick] [tests] [benchmark] [real]" >&2; exit 2 ;;
    esac
done
PY=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
CARD=$("$PY" -c "import torch; print(torch.cuda.get_device_name() if '$DEVICE' == 'cuda' else 'cpu')") || exit 1
OUT=${OUT:-scale/results/$(echo "$CARD${QUICK:+ quick}" | tr ' /' '--')}
LEARN=${LEARN:-120} STARTED=$(date +%s) SLOW=${QUICK:+1800}  # a busy CPU may take long
mkdir -p "$OUT"
WORK=$(mktemp -d)
LAST=runs/last-small # what train.py leaves there is gone at the end: put back what was there
if [ -f "$LAST" ]; then cp "$LAST" "$WORK/last"; fi
trap 'if [ -f "$WORK/last" ]; then cp "$WORK/last" "$LAST"; else rm -f "$LAST"; fi; rm -rf "$WORK"' EXIT

say() { echo "$(($(date +%s) - STARTED)) s: $*"; }

part() { # name, seconds, command...: its output goes to OUT/name.log
    local name=$1 limit=$2 began; shift 2
    case ${PARTS:-$name} in *"$name"*) ;; *) return ;; esac
    began=$(date +%s)
    if timeout "$limit" "$@" > "$OUT/$name.log" 2>&1; then
        say "$name: done in $(($(date +%s) - began)) s"
    else
        say "$name: FAILED, status $? after $(($(date +%s) - began)) s; the end of $OUT/$name.log:"
        tail -n 15 "$OUT/$name.log"
    fi
}

learn() { # the real run: how fast it goes, then as many steps as there is time for, then what came of it
    set -e
    local size=${QUICK:+16} batch=${QUICK:+4} steps name pid
    local flags=(--config small --base "$LLM" --data "$DATA" ${VAL:+--val-data "$VAL"} --device "$DEVICE"
        --image-size "${size:-64}" --latent-channels 16 --batch-size "${batch:-256}" --optimizer adamw --lr 5e-4
        --lr-final 1e-5 --ema 0.99 --caption-first 0.7 --log-every 10)
    if [ -z "$QUICK" ]; then flags+=(--unet-channels 128,256 --dtype bfloat16 --schedule-shift 2); fi
    "$PY" train.py "${flags[@]}" --out "$WORK/rate" --steps "$([ -n "$QUICK" ] && echo 12 || echo 40)" \
        --warmup 5 --val-every 100000 --sheet-every 0
    steps=$("$PY" - "$WORK/rate/metrics.jsonl" "$LEARN" "${QUICK:+20}" "${batch:-256}" <<'PYTHON'
import json, sys
lines = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
rate = lines[-2 if len(lines) > 2 else -1]["images_per_second"]  # without that of the first kernels
print(sys.argv[3] or max(100, int(0.85 * float(sys.argv[2]) * rate / int(sys.argv[4]))))
PYTHON
    )
    echo "$steps steps"
    "$PY" train.py "${flags[@]}" --out "$WORK/real" --steps "$steps" --warmup "$((steps / 20 + 1))" \
        --val-every "$((steps / 8 + 1))" --sheet-every 0
    cp "$WORK/real/curves.png" "$WORK/real/metrics.jsonl" "$OUT/"
    grep '"val"' "$WORK/real/metrics.jsonl" | tail -n 1
    "$PY" - "$DATA" "${VAL:-$DATA}" "$WORK" "${size:-64}" <<'PYTHON'
import random, sys
from scale.pictures import load_pictures
for source, name in zip(sys.argv[1:3], ("training", "held-out")):
    names = sorted(set(load_pictures(source, int(sys.argv[4])).captions))
    some = random.Random(0).sample(names, min(36, len(names)))
    open(f"{sys.argv[3]}/{name}.txt", "w", encoding="utf-8").write("\n".join(some) + "\n")
PYTHON
    local few=${QUICK:+2} pids=() status=0
    look() { # name, command...: beside one another
        local name=$1; shift
        "$PY" "$@" --checkpoint "$WORK/real" --device "$DEVICE" > "$WORK/$name.out" 2>&1 &
        pids+=($!)
    }
    for name in training held-out; do
        look "$name" sample.py --prompts "$WORK/$name.txt" --labels --steps "${few:-50}" --out "$OUT/$name.png"
    done
    look captions evaluate.py --data "${VAL:-$DATA}" --captions "$OUT/captions.json" --max-tokens 16
    look text evaluate.py --text LICENSE
    for pid in "${pids[@]}"; do wait "$pid" || status=1; done
    cat "$WORK"/{training,held-out,captions,text}.out
    return $status
}

say "$CARD; results in $OUT"
if [ "$DEVICE" = cpu ]; then export LMFUSION_GPU_TESTS_ON=cpu; fi
part tests "${SLOW:-180}" "$PY" -m pytest -rs -n 4 -m gpu tests/test_gpu.py
part benchmark "${SLOW:-230}" "$PY" -m scale.benchmark --device "$DEVICE" $QUICK --json "$OUT/benchmark.json"
if [ -n "$QUICK" ] && [ -z "${LLM:-}" ]; then
    "$PY" -c "
from pathlib import Path
from scale.benchmark import write_noise
from small.pretrain import pretrain_base
pretrain_base(Path('$WORK/llm'), steps=2)
write_noise(Path('$WORK/pictures'), 44, 16)" > /dev/null 2>&1
    LLM=$WORK/llm DATA=$WORK/pictures
fi
if [ -n "${LLM:-}" ] && [ -n "${DATA:-}" ]; then
    export -f learn
    export PY QUICK OUT WORK DEVICE LEARN LLM DATA VAL="${VAL:-}"
    part real "$((LEARN + 150))" bash -c learn
else
    say "real: left out; LLM and DATA say with what"
fi
say "done"
for name in tests benchmark real; do
    if [ -f "$OUT/$name.log" ]; then grep '^|' "$OUT/$name.log" || tail -n 3 "$OUT/$name.log"; fi
done
