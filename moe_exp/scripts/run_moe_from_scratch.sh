#!/usr/bin/env bash
# Train a mixture of experts from nothing, with the variables of Megatron's scripts, through `torchrun -m dmoe.train`.
#
#     ./run_moe_from_scratch.sh                                    # a tiny model on one process
#     NPROC=2 EP=2 NUM_EXPERTS=16 ./run_moe_from_scratch.sh        # its experts spread over two
#     NPROC=8 TP=2 PP=2 VPP=2 EP=4 HIDDEN=2048 NUM_LAYERS=16 ./run_moe_from_scratch.sh --train.compile true
#
# Arguments are passed on to dmoe.train and win over the variables. Those, with their defaults:
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

: "${NPROC:=1}" "${MASTER_ADDR:=127.0.0.1}" "${MASTER_PORT:=29500}"  # processes on this host; the meeting point
: "${NNODES:=1}" "${NODE_RANK:=0}"                                   # hosts, and which of them this one is
: "${TP:=1}" "${PP:=1}" "${VPP:=1}" "${CP:=1}" "${EP:=1}"            # VPP: pipeline stages on each rank
: "${USE_MOE:=1}" "${MOE_TYPE:=dmoe}" "${NUM_EXPERTS:=8}" "${TOPK:=2}"
: "${NUM_LAYERS:=4}" "${HIDDEN:=64}" "${NUM_HEADS:=4}" "${NUM_KV_HEADS:=$NUM_HEADS}"
: "${FFN_HIDDEN:=$((HIDDEN * 4))}" "${MOE_FFN_HIDDEN:=$((HIDDEN * 2))}"  # widths of a dense layer and of one expert
: "${SEQ_LEN:=128}" "${MBSZ:=2}" "${GBSZ:=16}" "${TRAIN_ITERS:=30}"      # MBSZ: per data-parallel rank; GBSZ: of all
: "${LR:=3e-3}" "${MIN_LR:=3e-4}" "${WARMUP_ITERS:=5}" "${SEED:=0}"
: "${CORPUS:=$ROOT/dmoe/*/*.py}" "${TOKENIZER:=bytes}" "${VOCAB_SIZE:=260}" # small and at hand: dmoe's own source
: "${RUN_DIR:=}"                                                          # runs/PRESET-DATE-TIME

fail() {
    echo "run_moe_from_scratch.sh: $*" >&2
    exit 2
}

whole_number() { # NAME...: each must be one, from 1
    local name
    for name; do
        [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "$name is '${!name}': must be a whole number from 1"
    done
}

divides() { # DIVISOR NUMBER WHAT: NUMBER must be divisible
    (($2 % $1 == 0)) || fail "$3"
}

whole_number NPROC NNODES TP PP VPP CP EP NUM_EXPERTS TOPK NUM_LAYERS HIDDEN NUM_HEADS NUM_KV_HEADS \
    FFN_HIDDEN MOE_FFN_HIDDEN SEQ_LEN MBSZ GBSZ TRAIN_ITERS VOCAB_SIZE
[[ $USE_MOE =~ ^[01]$ ]] || fail "USE_MOE is '$USE_MOE': must be 0 (a dense model) or 1"
[[ $MOE_TYPE == dmoe ]] || fail "MOE_TYPE is '$MOE_TYPE': must be dmoe (dropless), the only kind there is"

RANKS=$((NPROC * NNODES))
MODEL_RANKS=$((TP * PP * CP))
divides $MODEL_RANKS $RANKS "$RANKS ranks (NPROC $NPROC x NNODES $NNODES): must be divisible by TP $TP x PP $PP x CP $CP"
DP=$((RANKS / MODEL_RANKS))
MICRO=$((MBSZ * DP)) # dmoe counts the sequences of all data-parallel ranks
divides $MICRO "$GBSZ" "GBSZ is $GBSZ: must be divisible by MBSZ $MBSZ x $DP data-parallel ranks = $MICRO"
divides "$NUM_HEADS" "$HIDDEN" "HIDDEN is $HIDDEN: must be divisible by NUM_HEADS ($NUM_HEADS)"
divides $((PP * VPP)) "$NUM_LAYERS" "NUM_LAYERS is $NUM_LAYERS: must be divisible by PP $PP x VPP $VPP"
((VPP == 1 || PP > 1)) || fail "VPP is $VPP: must be 1 with PP 1"

# The floating-point numbers that MIN_LR and LR are, as a ratio.
MIN_LR_RATIO=$(awk -v min="$MIN_LR" -v peak="$LR" 'BEGIN {
    if (peak + 0 <= 0 || min + 0 < 0 || min + 0 > peak + 0) exit 1
    printf "%.10g", min / peak }') || fail "LR is '$LR' and MIN_LR is '$MIN_LR': must be numbers with 0 <= MIN_LR <= LR, 0 < LR"

OPTIONS=(
    --model.num_layers "$NUM_LAYERS" --model.hidden_size "$HIDDEN" --model.intermediate_size "$FFN_HIDDEN"
    --model.num_heads "$NUM_HEADS" --model.num_kv_heads "$NUM_KV_HEADS" --model.head_dim $((HIDDEN / NUM_HEADS))
    --model.vocab_size "$VOCAB_SIZE" --data.corpus "$CORPUS" --data.tokenizer "$TOKENIZER"
    --train.seq_len "$SEQ_LEN" --train.batch_size "$GBSZ" --train.micro_batch_size $MICRO
    --train.steps "$TRAIN_ITERS" --train.seed "$SEED"
    --optim.lr "$LR" --optim.min_lr_ratio "$MIN_LR_RATIO" --optim.warmup_steps "$WARMUP_ITERS"
    --parallel.tp "$TP" --parallel.pp "$PP" --parallel.cp "$CP"
)
if ((USE_MOE)); then
    divides "$EP" "$NUM_EXPERTS" "NUM_EXPERTS is $NUM_EXPERTS: must be divisible by EP ($EP)"
    divides "$EP" $((DP * CP * TP)) "EP is $EP: must divide the $DP data-parallel ranks x CP $CP x TP $TP = $((DP * CP * TP))"
    ((TOPK <= NUM_EXPERTS)) || fail "TOPK is $TOPK: must be at most NUM_EXPERTS ($NUM_EXPERTS)"
    OPTIONS+=(
        --model.moe.num_experts "$NUM_EXPERTS" --model.moe.top_k "$TOPK"
        --model.moe.intermediate_size "$MOE_FFN_HIDDEN" --parallel.ep "$EP"
    )
else
    ((EP == 1)) || fail "EP is $EP: must be 1 with USE_MOE 0"
    OPTIONS+=(--model.moe_layer_freq 0)
fi
((VPP == 1)) || OPTIONS+=(--parallel.schedule interleaved_1f1b --parallel.stages_per_rank "$VPP")
[[ $TOKENIZER != bpe ]] || OPTIONS+=(--data.vocab_size "$VOCAB_SIZE")
[[ -z $RUN_DIR ]] || OPTIONS+=(--run_dir "$RUN_DIR")

export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" # a clone that is not installed works too
COMMAND=(
    torchrun --nproc_per_node="$NPROC" --nnodes="$NNODES" --node_rank="$NODE_RANK"
    --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" -m dmoe.train "${OPTIONS[@]}" "$@"
)
printf '%q ' "${COMMAND[@]}"
echo
exec "${COMMAND[@]}"
