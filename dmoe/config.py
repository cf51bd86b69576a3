"""The dataclasses of a run: every field, its default, its meaning and the checks on it.

A run is one `RunConfig`; its sections are the nested dataclasses. `dmoe.cli.options` reads YAML and the command line
into it. All are frozen: use `dataclasses.replace`. Checks raise `ConfigError` naming the field, its value and a
value that would be right.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dmoe.errors import ConfigError

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu"]
Backend = Literal["reference", "torch", "triton"]
Schedule = Literal[
    "gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev"
]  # fmt: skip
SINGLE_STAGE_SCHEDULES = ("gpipe", "1f1b")
V_SCHEDULES = ("zbv", "dualpipev")
SPLIT_BACKWARD_SCHEDULES = ("interleaved_zero_bubble", "zbv", "dualpipev")


def require(ok: bool, name: str, value: Any, wanted: str) -> None:
    """Raise `ConfigError` "`name` is `value`: must be `wanted`" unless `ok`."""
    if not ok:
        raise ConfigError(f"{name} is {value!r}: must be {wanted}")


def _require_positive(config: Any, section: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(math.isfinite(value), f"{section}.{name}", value, "finite")
        require(value > 0, f"{section}.{name}", value, "greater than 0")


def _require_not_negative(config: Any, section: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(math.isfinite(value), f"{section}.{name}", value, "finite")
        require(value >= 0, f"{section}.{name}", value, "0 or greater")


def _require_types(config: Any, section: str) -> None:
    """Check choices and integers of a config that was built in Python; the command line converts before."""
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        options = get_args(kind)
        literals = options if get_origin(kind) is Literal else [o for a in options for o in get_args(a)]
        if literals and not (value is None and type(None) in options):
            require(value in literals, f"{section}.{name}", value, f"one of {', '.join(map(str, literals))}")
        if kind is int:
            require(isinstance(value, int) and not isinstance(value, bool), f"{section}.{name}", value, "an integer")


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """One mixture-of-experts layer."""

    hidden_size: int = 0
    """D, width of the residual stream. 0: taken from the model that holds the layer."""
    intermediate_size: int = 192
    """F, width of one expert."""
    num_experts: int = 8
    """E, routed experts."""
    top_k: int = 2
    """K, experts per token."""
    activation: Activation = "silu"
    """Expert activation. With gated experts "silu" is SwiGLU; "clamped_swiglu" is the form of gpt-oss."""
    gated: bool = True
    """Gate and up projection (GLU experts), or up projection alone."""
    bias: bool = False
    """Biases in the experts."""
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    """How router logits become scores: softmax over all experts, or a sigmoid each (DeepSeek-V3)."""
    norm_topk_prob: bool = True
    """Divide the K chosen scores by their sum."""
    routed_scaling_factor: float = 1.0
    """Factor on the routed weights, after renormalisation."""
    aux_loss_coef: float = 0.01
    """Weight of the switch-style load-balancing loss in each layer; the loss is 1 at equal load. 0 turns it off."""
    z_loss_coef: float = 0.001
    """Weight of the router z-loss, mean(logsumexp(logits)^2). 0 turns it off."""
    shared_intermediate_size: int = 0
    """Width of the shared expert that every token passes through. 0: none."""
    backend: Backend | None = None
    """Implementation of the expert computation; None chooses by device and dtype."""
    precision: Literal["same", "fp8"] = "same"
    """Matrix products of the routed experts: in the dtype of the tensors, or with operands rounded to 8 bits, forward
    and for the gradients of activations (weight gradients stay bf16). Hopper GPUs compute in fp8, others emulate it."""

    def __post_init__(self) -> None:
        _require_types(self, "moe")
        _require_positive(self, "moe", "intermediate_size", "num_experts", "top_k", "routed_scaling_factor")
        _require_not_negative(self, "moe", "hidden_size", "aux_loss_coef", "z_loss_coef", "shared_intermediate_size")
        if self.top_k > self.num_experts:
            require(False, "moe.top_k", self.top_k, f"at most moe.num_experts ({self.num_experts})")
        if self.activation == "clamped_swiglu":
            require(self.gated, "moe.gated", self.gated, 'True with moe.activation "clamped_swiglu"')
        if self.precision == "fp8":
            for name in ("hidden_size", "intermediate_size"):
                width = getattr(self, name)
                require(width % 16 == 0, f"moe.{name}", width, 'a multiple of 16 with moe.precision "fp8"')
            require(self.backend is None, "moe.backend", self.backend, 'none with moe.precision "fp8"')


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only language model. `moe_layers()` says which layers are mixtures of experts."""

    vocab_size: int = 2048
    """Rows of the embedding; at least the tokeniser's."""
    hidden_size: int = 128
    """D, width of the residual stream."""
    num_layers: int = 4
    """Decoder blocks."""
    num_heads: int = 2
    """Query heads."""
    num_kv_heads: int = 1
    """Key/value heads (grouped-query attention)."""
    head_dim: int = 64
    """Width of one head."""
    qk_norm: Literal["none", "head", "full"] = "head"
    """RMSNorm on queries and keys: over each head (Qwen3), over all heads at once (OLMoE), or none."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    tie_embeddings: bool = True
    """Head shares its weight with the embedding."""
    intermediate_size: int = 384
    """Width of a dense layer's feed-forward network."""
    moe_layer_freq: int = 1
    """Every n-th layer is a mixture of experts. 0: a dense model."""
    first_k_dense: int = 0
    """The first k layers are dense."""
    max_seq_len: int = 4096
    """Longest sequence the model takes."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; output projections are divided by sqrt(2 * num_layers)."""
    moe: MoEConfig = field(default_factory=MoEConfig)
    """The mixture-of-experts layers."""

    def __post_init__(self) -> None:
        _require_types(self, "model")
        _require_positive(
            self, "model", "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
            "rope_theta", "norm_eps", "intermediate_size", "max_seq_len", "init_std",
        )  # fmt: skip
        _require_not_negative(self, "model", "moe_layer_freq", "first_k_dense")
        if self.moe_layer_freq and self.first_k_dense >= self.num_layers:
            wanted = f"less than model.num_layers ({self.num_layers}); a dense model has model.moe_layer_freq 0"
            require(False, "model.first_k_dense", self.first_k_dense, wanted)
        require(
            self.num_heads % self.num_kv_heads == 0,
            "model.num_heads", self.num_heads, f"divisible by model.num_kv_heads ({self.num_kv_heads})",
        )  # fmt: skip
        require(self.head_dim % 2 == 0, "model.head_dim", self.head_dim, "even (rotary embedding)")
        if self.moe.hidden_size not in (0, self.hidden_size):
            require(
                False, "model.moe.hidden_size", self.moe.hidden_size,
                f"0 (taken from the model) or equal to model.hidden_size ({self.hidden_size})",
            )  # fmt: skip

    def moe_layers(self) -> list[int]:
        """Indices of the layers that are mixtures of experts."""
        if self.moe_layer_freq == 0:
            return []
        return [i for i in range(self.first_k_dense, self.num_layers) if i % self.moe_layer_freq == 0]

    def layer_moe_config(self) -> MoEConfig:
        """`moe` with its width filled in."""
        return replace(self.moe, hidden_size=self.hidden_size)


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
        _require_types(self, "data")
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
        _require_types(self, "optim")
        _require_positive(self, "optim", "lr", "eps")
        _require_not_negative(self, "optim", "weight_decay", "clip_norm", "warmup_steps")
        require(0 <= self.min_lr_ratio <= 1, "optim.min_lr_ratio", self.min_lr_ratio, "in [0, 1]")
        require(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "two numbers in [0, 1)")
        require(0 < self.decay_fraction <= 1, "optim.decay_fraction", self.decay_fraction, "in (0, 1]")


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
        _require_types(self, "train")
        _require_positive(
            self, "train", "steps", "batch_size", "micro_batch_size", "seq_len", "log_every", "eval_batches",
            "max_skipped_steps",
        )  # fmt: skip
        _require_not_negative(self, "train", "eval_every", "peak_tflops", "sample_tokens", "seed")
        if self.sample_tokens:
            require(bool(self.sample_prompt), "train.sample_prompt", "", "not empty, or train.sample_tokens 0")
        require(
            self.batch_size % self.micro_batch_size == 0,
            "train.batch_size", self.batch_size, f"divisible by train.micro_batch_size ({self.micro_batch_size})",
        )  # fmt: skip
        require(self.seed < 2**63, "train.seed", self.seed, "less than 2**63")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a model is spread over ranks. Their number is pp x dp_replicate x dp_shard x cp x tp.

    The numbers of a run do not depend on this section: only their rounding and the time do.
    """

    dp_replicate: int = 1
    """Copies of the (sharded) model; gradients are summed over them. With dp_shard > 1 this is HSDP."""
    dp_shard: int = -1
    """Ranks that a copy is sharded over with FSDP. -1: what the other axes leave."""
    cp: int = 1
    """Ranks that a sequence is split over (context parallel). FSDP also shards over them."""
    tp: int = 1
    """Ranks that attention heads, widths and the vocabulary are split over (tensor parallel)."""
    ep: int = 1
    """Ranks that the experts are spread over; divides dp_shard x cp x tp. 1: tp splits the experts' width instead."""
    pp: int = 1
    """Ranks that the layers are spread over (pipeline parallel)."""
    sequence_parallel: bool = True
    """With tp: split activations between the layers along the sequence."""
    loss_parallel: bool = True
    """With tp: never assemble the logits of the whole vocabulary on a rank."""
    reshard_after_forward: bool = True
    """With FSDP: free a layer's gathered weights after its forward and gather them again for the backward. Pipeline
    schedules that split the backward keep them."""
    schedule: Schedule = "1f1b"
    """Pipeline schedule. Several stages a rank: interleaved_1f1b, looped_bfs, interleaved_zero_bubble; two in the shape
    of a V: zbv, dualpipev."""
    stages_per_rank: int = 0
    """Pipeline stages a rank holds. 0: what the schedule needs, 1 or 2."""
    exchange: Literal["same", "bf16", "fp8"] = "same"
    """What expert parallelism sends: activations as they are, in bf16, or in fp8 (e4m3, a scale a row; gradients
    and results bf16)."""
    max_rows: int = 0
    """With ep: most rows a rank takes in at once; a rank that more are sent to works in chunks. 0: no bound."""
    timeout_seconds: float = 600.0
    """A collective that waits longer ends the run with an error."""

    def __post_init__(self) -> None:
        _require_types(self, "parallel")
        _require_positive(self, "parallel", "dp_replicate", "cp", "tp", "ep", "pp", "timeout_seconds")
        _require_not_negative(self, "parallel", "stages_per_rank", "max_rows")
        require(self.dp_shard == -1 or self.dp_shard > 0, "parallel.dp_shard", self.dp_shard, "greater than 0, or -1")
        stages, kind = self.num_local_stages, f'parallel.schedule "{self.schedule}"'
        if self.schedule in SINGLE_STAGE_SCHEDULES:
            require(stages == 1, "parallel.stages_per_rank", stages, f"1 with {kind}")
        elif self.schedule in V_SCHEDULES:
            require(stages == 2, "parallel.stages_per_rank", stages, f"2 with {kind}")
        else:
            require(stages > 1, "parallel.stages_per_rank", stages, f"2 or more with {kind}")

    @property
    def num_local_stages(self) -> int:
        """Pipeline stages of a rank."""
        return self.stages_per_rank or (1 if self.schedule in SINGLE_STAGE_SCHEDULES else 2)


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
        _require_types(self, "checkpoint")
        _require_not_negative(self, "checkpoint", "every")
        require(self.keep >= 2, "checkpoint.keep", self.keep, "at least 2")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run."""

    preset: str = "tiny-moe"
    """Model preset that `model` starts from; see `dmoe train --help`."""
    run_dir: str = ""
    """Folder of the run. "": runs/PRESET-DATE-TIME."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        require(
            self.train.seq_len <= self.model.max_seq_len,
            "train.seq_len", self.train.seq_len, f"at most model.max_seq_len ({self.model.max_seq_len})",
        )  # fmt: skip
        require(
            self.data.tokenizer != "bpe" or self.data.vocab_size <= self.model.vocab_size,
            "data.vocab_size", self.data.vocab_size, f"at most model.vocab_size ({self.model.vocab_size})",
        )  # fmt: skip


def config_to_yaml(config: Any) -> str:
    """A config dataclass as YAML, every field written out."""
    import yaml

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return yaml.safe_dump(plain(asdict(config)), sort_keys=False, allow_unicode=True)
