#!/usr/bin/env bash
# Rank r against band d at equal parameter count on glyphs, with and without the residual: three base models, three
# seeds each.
# Arguments are appended to every training command: with --steps 2 this is a smoke test.
set -euo pipefail
export OMP_NUM_THREADS=1
OUT=${OUT:-out/reproduce}
for s in 0 1 2; do
    base=$OUT/base-glyphs-$s/pretrain/model.pt
    python train_vit.py pretrain --seed $s --out $OUT/base-glyphs-$s "$@"
    python train_vit.py --init $base --seeds 3 --out $OUT/rank-band-$s "$@" --methods head svft:off_diagonals=2 \
        svft:rank=64,off_diagonals=5 svft:rank=32,off_diagonals=12 svft:rank=25,off_diagonals=24
    while read -r rank band lr; do   # base models whose adapted weights keep only their first singular values
        python docs/lab/truncate.py $base $rank $OUT/base-glyphs-$s/rank-$rank.pt
        python train_vit.py --init $OUT/base-glyphs-$s/rank-$rank.pt --seeds 3 --out $OUT/rank-$rank-head-$s "$@" \
            --methods head < /dev/null
        python train_vit.py --init $OUT/base-glyphs-$s/rank-$rank.pt --seeds 3 --lr $lr --out $OUT/rank-$rank-$s "$@" \
            --methods svft:rank=$rank,off_diagonals=$band < /dev/null
    done <<END
64 5 0.02
32 12 0.01
25 24 0.01
END
done
python -m svmini.aggregate $OUT/rank-band-?/results.json --baseline svft:off_diagonals=2
