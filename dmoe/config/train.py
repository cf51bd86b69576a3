"""Data, optimiser, loop and checkpoints of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dmoe.config.checks import require, require_not_negative, require_positive, require_types


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text, tokeniser and split."""

    corpus: str = "stdlib"
    """"stdlib" (the Python standard library's source), a text file, a folder, a glob, or .jsonl, a document a line."""
    text_field: str = "text"
    """Key of the text in each line of a .jsonl file."""
    tokenizer: str = "bpe"
    """"bpe" (byte-level BPE trained on the corpus), "bytes", or the path of a tokenizer.json."""
    vocab_size: int = 2048
    """Size of the BPE that is trained: 256 bytes, the end-of-document token, and merges."""
    val_fraction: float = 0.05
    """Share of the documents that is held out, chosen by a hash of each document's text."""
    cache_dir: str = ""
    """Where tokenisers and token files are kept. "": $DMOE_CACHE, else ~/.cache/dmoe."""

    def __post_init__(self) -> None:
        require_types(self, "data")
        require(bool(self.corpus), "data.corpus", self.corpus, 'a path or "stdlib"')
        require(0 < self.val_fraction < 1, "data.val_fraction", self.val_fraction, "between 0 and 1")
        require(self.vocab_size >= 257, "data.vocab_size", self.vocab_size, "at least 257 (256 bytes and the end mark)")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 3e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Decay of matrices; norms, biases and router weights are not decayed."""
    clip_norm: float = 1.0
    """Largest global gradient norm. 0: no clipping."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine to the minimum, or warm-up-stable-decay (linear decay at the end), or constant."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    decay_fraction: float = 0.3
    """Share of the steps that "wsd" decays over."""
    min_lr_ratio: float = 0.05
    """Learning rate at the end, as a share of the peak."""

    def __post_init__(self) -> None:
        require_types(self, "optim")
        require_positive(self, "optim", "lr", "eps")
        require_not_negative(self, "optim", "weight_decay", "clip_norm", "warmup_steps")
        require(0 <= self.min_lr_ratio <= 1, "optim.min_lr_ratio", self.min_lr_ratio, "in [0, 1]")
        require(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "two numbers in [0, 1)")
        require(0 < self.decay_fraction <= 1, "optim.decay_fraction", self.decay_fraction, "in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters that are trained in place of the weights; see docs/finetuning.md."""

    rank: int = 0
    """Rank of an adapter. 0: none, and the weights themselves are trained."""
    alpha: float = 16.0
    """An adapter's product is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of the inputs of an adapter that is set to 0 in training. Only for linear maps."""
    targets: tuple[str, ...] = ("attention", "experts")
    """What gets adapters: "attention" or single projections as "q_proj", "mlp" (dense networks and shared experts),
    "experts", "router", or any part of a module's name, * standing for anything."""

    def __post_init__(self) -> None:
        require_types(self, "train.lora")
        require_not_negative(self, "train.lora", "rank")
        require_positive(self, "train.lora", "alpha")
        require(0 <= self.dropout < 1, "train.lora.dropout", self.dropout, "in [0, 1)")
        require(bool(self.targets), "train.lora.targets", self.targets, "at least one name, such as attention")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 8
    """Sequences per optimiser step, over all ranks."""
    micro_batch_size: int = 8
    """Sequences per forward pass, over all ranks; gradients accumulate over batch_size / micro_batch_size passes."""
    seq_len: int = 256
    """Tokens per sequence."""
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """bf16 autocast over fp32 weights, or fp32. "auto": bf16 where the device has it in hardware. "fp64" (weights too)
    is for comparisons: rounding cannot hide behind a tolerance."""
    compile: bool = False
    """torch.compile each decoder block."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in the backward pass."""
    device: str = "auto"
    """"auto", "cpu", "cuda" or "cuda:N"."""
    seed: int = 0
    """Seeds the weights, the data order and the sample."""
    log_every: int = 10
    """Steps between lines of metrics."""
    eval_every: int = 200
    """Steps between validations on `eval_batches` batches. 0: only at the end."""
    eval_batches: int = 16
    """Micro-batches of a periodic validation; the last one reads the whole held-out text."""
    init_from: str = ""
    """Folder of a run or of a Hugging Face model that the weights start from. "": random ones. On the command line
    (also --init-from DIR) `model` and `data.tokenizer` come from there too."""
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained: parts of their names, as router, attention, experts or layers.0, * standing for
    anything."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Adapters in place of the weights."""
    max_skipped_steps: int = 10
    """Steps that may be skipped in a row because the loss or a gradient was not finite."""
    peak_tflops: float = 0.0
    """Peak TFLOP/s of the device for MFU. 0: known GPUs by name, a matrix product measured at start elsewhere."""
    tensorboard: bool = True
    """Write TensorBoard event files next to metrics.jsonl."""
    sample_prompt: str = "def "
    """Prompt of the sample printed at the end."""
    sample_tokens: int = 120
    """Tokens of that sample. 0: none."""

    def __post_init__(self) -> None:
        require_types(self, "train")
        require_positive(
            self, "train", "steps", "batch_size", "micro_batch_size", "seq_len", "log_every", "eval_batches",
            "max_skipped_steps",
        )  # fmt: skip
        require_not_negative(self, "train", "eval_every", "peak_tflops", "sample_tokens", "seed")
        if self.sample_tokens:
            require(bool(self.sample_prompt), "train.sample_prompt", "", "not empty, or train.sample_tokens 0")
        require(
            self.batch_size % self.micro_batch_size == 0,
            "train.batch_size", self.batch_size, f"divisible by train.micro_batch_size ({self.micro_batch_size})",
        )  # fmt: skip
        require(self.seed < 2**63, "train.seed", self.seed, "less than 2**63")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and resuming."""

    every: int = 250
    """Steps between checkpoints. 0: only at the end."""
    keep: int = 2
    """Newest checkpoints that are kept; at least 2, so that a damaged one has a predecessor."""
    async_save: bool = False
    """Go on training while a copy in CPU memory is written."""

    def __post_init__(self) -> None:
        require_types(self, "checkpoint")
        require_not_negative(self, "checkpoint", "every")
        require(self.keep >= 2, "checkpoint.keep", self.keep, "at least 2")
