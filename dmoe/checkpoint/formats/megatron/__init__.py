"""Megatron checkpoints, in and out: Megatron-core's `torch_dist` and files a rank, and the fork that runs MegaBlocks.

`flags` has arguments as ModelConfig and back, `names` a rank's tensors as views of ours, `legacy` and `torch_dist`
their files, `fork` single layers of the fork's checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from dmoe.checkpoint.formats.megatron import flags, folders, legacy
from dmoe.checkpoint.formats.megatron.names import ExpertNames, Form, NormNames, padded_vocab, rank_mapping, whole_model
from dmoe.checkpoint.formats.publish import published
from dmoe.checkpoint.formats.store import Source
from dmoe.config import ModelConfig, require
from dmoe.errors import ConfigError, RunError

Files = Literal["torch_dist", "legacy"]


def is_one(path: Path | str) -> bool:
    """Whether a folder is a Megatron checkpoint, or a training run's folder of them."""
    return folders.holds_checkpoint(Path(path))


def open(
    path: Path | str,
    *,
    config: ModelConfig | None = None,
    vocab_size: int | None = None,
    iteration: int | None = None,
) -> Source:
    """The model in a Megatron checkpoint.

    Args:
        path: a training run's folder (its latest checkpoint), or one checkpoint's.
        config: the model. None: by the arguments that the checkpoint carries.
        vocab_size: rows of the embedding that are no padding. None: by the arguments, else all.
        iteration: which checkpoint of a training run's folder, 0 for `release`.

    Raises:
        ConfigError: a model that our `Decoder` does not compute, or a checkpoint without arguments and no `config`.
        RunError: files that are missing, damaged, or not those of the configuration.
    """
    folder = folders.iteration_folder(Path(path), iteration)
    return (_open_dist if folders.is_dist(folder) else _open_ranks)(folder, config, vocab_size)


def _open_ranks(folder: Path, config: ModelConfig | None, vocab_size: int | None) -> Source:
    from dmoe.checkpoint.formats.mapped import MappedSource

    files = legacy.RankFiles(folder)
    layout = files.layout()
    form = files.form(layout)
    config = config or _config(files.args, vocab_size, folder)
    _check_rows(form.padded_vocab, config, folder)
    store = legacy.RankStore(files, config, layout, form)
    return MappedSource(store, legacy.mapping(config, layout, form), config)


def _open_dist(folder: Path, config: ModelConfig | None, vocab_size: int | None) -> Source:
    from dmoe.checkpoint.formats.mapped import MappedSource
    from dmoe.checkpoint.formats.megatron import torch_dist, torch_files
    from dmoe.checkpoint.formats.megatron.dist_metadata import read_metadata

    torch_dist.check_backend(folder)
    metadata = read_metadata(folder)
    if config is None:
        args = torch_dist.read_common(folder, metadata).get("args")
        known = {} if args is None or isinstance(args, torch_files.Opaque) else torch_files.plain(args)
        config = _config(known, vocab_size, folder)
    embedding = metadata.state_dict_metadata.get(legacy.EMBEDDING)
    rows = embedding.size[0] if embedding is not None and hasattr(embedding, "size") else config.vocab_size
    _check_rows(rows, config, folder)
    mapping = rank_mapping(config, whole_model(config), Form(rows, "local", "sequential"))
    store = torch_dist.DistStore(folder, metadata, [stored.name for stored in mapping], config)
    return MappedSource(store, mapping, config)


def _check_rows(rows: int, config: ModelConfig, folder: Path) -> None:
    if rows < config.vocab_size:
        raise RunError(f"{folder}: the embedding has {rows} rows: must have model.vocab_size ({config.vocab_size})")


def _config(args: dict[str, Any], vocab_size: int | None, folder: Path) -> ModelConfig:
    if not args:
        raise ConfigError(f"{folder}: carries no arguments of its run: must be given a configuration (config)")
    return flags.from_args(args, vocab_size)


def write(
    source: Source,
    dst: Path | str,
    *,
    files: Files = "torch_dist",
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    experts: ExpertNames = "sequential",
    norms: NormNames = "te",
    vocab_divisor: int = 128,
    iteration: int = 0,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the model as a checkpoint that Megatron-core loads, with the arguments for `--use-checkpoint-args`.

    Args:
        dst: becomes the folder that `--load` takes; absent or empty before. Appears whole or not at all.
        files: "torch_dist", which loads at any layout, or "legacy": files a rank, for the layout below alone.
        tp, pp, ep: ranks of tensor, pipeline and expert parallelism. With "torch_dist", tp pads the vocabulary alone.
        experts: "sequential", "grouped" (TEGroupedMLP) or "weight1" (GroupedMLP up to 0.16); "legacy" alone.
        norms: "te" or "local": the implementation of the layers that will load it.
        vocab_divisor: Megatron's make_vocab_size_divisible_by; padding rows are zeros.
        iteration: names the checkpoint; 0 is `release`.
        dtype: of the weights. None: the source's.

    Raises:
        ConfigError: a model that Megatron's GPTModel does not compute, or that cannot be split so. Names the field.
        RunError: the disk refuses.
    """
    config = source.config
    args = flags.to_args(config)
    for name, value, options in (("files", files, ("torch_dist", "legacy")), ("norms", norms, ("te", "local")),
                                 ("experts", experts, ("sequential", "grouped", "weight1"))):  # fmt: skip
        require(value in options, name, value, f"one of {', '.join(options)}")
    require(vocab_divisor >= 1, "vocab_divisor", vocab_divisor, "at least 1")
    folders.check_iteration(iteration)
    layout = legacy.Layout(tp, pp, ep)
    layout.check(config)
    rows = padded_vocab(config.vocab_size, vocab_divisor, tp)
    args |= _run_args(source, layout, files, experts, norms, vocab_divisor, rows, dtype)
    common = {"args": flags.namespace(args), "checkpoint_version": 3.0, "iteration": iteration}
    with published(Path(dst)) as temp:
        folder = temp / folders.folder_name(iteration)
        folder.mkdir()
        if files == "legacy":
            legacy.write(source, folder, layout, Form(rows, norms, experts), common, dtype)
        else:
            from dmoe.checkpoint.formats.megatron import torch_dist_write

            torch_dist_write.write(source, folder, rows, norms, common, dtype)
        (temp / folders.TRACKER).write_text(str(iteration or "release"), encoding="utf-8")


def _run_args(
    source: Source, layout: legacy.Layout, files: str, experts: str, norms: str, divisor: int, rows: int,
    dtype: torch.dtype | None,
) -> dict[str, Any]:  # fmt: skip
    """Arguments that say how the model is stored rather than what it computes."""
    params_dtype = dtype or source.dtype("embed_tokens.weight")
    return {
        "vocab_size": source.config.vocab_size,
        "padded_vocab_size": rows,
        "make_vocab_size_divisible_by": divisor,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.tp,
        "context_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "num_layers_per_virtual_pipeline_stage": None,
        "sequence_parallel": False,
        "params_dtype": params_dtype,
        "bf16": params_dtype == torch.bfloat16,
        "fp16": params_dtype == torch.float16,
        "transformer_impl": "transformer_engine" if norms == "te" else "local",
        "moe_grouped_gemm": experts != "sequential",
        "moe_use_legacy_grouped_gemm": experts == "weight1",
        "ckpt_format": "torch_dist" if files == "torch_dist" else "torch",
        "add_position_embedding": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "apply_query_key_layer_scaling": False,
        "tokenizer_type": None,
        "tokenizer_model": None,
        "vocab_file": None,
        "data_parallel_random_init": False,
        "phase_transition_iterations": None,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "no_save_optim": True,
        "no_save_rng": True,
    }
