"""One of two gloo ranks of test_formats_megatron_core.py: our files in megatron-core, and its files here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from formats_megatron_cases import CONFIGS, MemorySource, assert_same
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_cpu import parallel, patch_megatron

from dmoe.checkpoint.formats import megatron
from dmoe.models import Decoder
from dmoe.ops.collectives import leave_process_group

RENAMED = {
    # argument: field of TransformerConfig
    "num_experts": "num_moe_experts", "norm_epsilon": "layernorm_epsilon", "swiglu": "gated_linear_unit",
}  # fmt: skip


def transformer_config(args: dict[str, Any], **sizes: int) -> TransformerConfig:
    """As Megatron's trainer makes it of its arguments: fields by their names, and a few by others."""
    known = TransformerConfig.__dataclass_fields__
    fields = {RENAMED.get(name, name): value for name, value in args.items()}
    fields = {name: value for name, value in fields.items() if name in known and value is not None}
    fields |= {
        "activation_func": F.silu, "use_cpu_initialization": True, "bias_activation_fusion": False,
        "bias_dropout_fusion": False, "masked_softmax_fusion": False, "gradient_accumulation_fusion": False,
        "moe_token_dispatcher_type": "allgather", "hidden_dropout": 0.0, "attention_dropout": 0.0,
        "pipeline_dtype": torch.float32,
    }  # fmt: skip
    return TransformerConfig(**fields | sizes)


def gpt_model(args: dict[str, Any], **sizes: int) -> GPTModel:
    config = transformer_config(args, **sizes)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    return GPTModel(
        config, spec, args["padded_vocab_size"], args["max_position_embeddings"], position_embedding_type="rope",
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not args["untie_embeddings_and_output_weights"],
        rotary_base=args["rotary_base"], rotary_percent=args["rotary_percent"],
    )  # fmt: skip


def rank_file(folder: Path) -> dict[str, Any]:
    tp, pp = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    name = f"mp_rank_{tp:02d}"
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        name += f"_{pp:03d}"
    if parallel_state.get_expert_model_parallel_world_size() > 1:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    # With the loader of torch: what Megatron reads, it must be able to.
    return torch.load(folder / "release" / name / "model_optim_rng.pt", weights_only=False)


def rank_files(folder: Path, name: str, **sizes: int) -> None:
    """Our file of this rank has the names and shapes of Megatron's model, and loads strictly."""
    state = rank_file(folder)
    args = vars(state["args"])
    model = gpt_model(args, **sizes)
    wanted = {key: None if t is None else tuple(t.shape) for key, t in model.state_dict().items()}
    got = {key: None if t is None else tuple(t.shape) for key, t in state["model"].items()}
    assert got == wanted, (name, sizes, got.items() ^ wanted.items())
    model.load_state_dict(state["model"])


def logits(folder: Path, name: str) -> None:
    """Megatron's model computes from our file what our Decoder computes from the same weights."""
    state = rank_file(folder)
    model = gpt_model(vars(state["args"]))
    model.load_state_dict(state["model"])
    source = MemorySource(CONFIGS[name])
    decoder = Decoder(source.config).eval()
    missing, unexpected = decoder.load_state_dict(source.state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    ids = torch.arange(40).reshape(2, 20) * 7 % source.config.vocab_size
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).triu(1)
    positions = torch.arange(20).expand(2, -1)
    with torch.no_grad():
        theirs = model.eval()(ids, positions, mask)[..., : source.config.vocab_size]
        ours = decoder(ids)
    scale = ours.abs().max()
    assert (theirs - ours).abs().max() < 2e-5 * scale, (name, (theirs - ours).abs().max(), scale)


def loads_ours(folder: Path, norms: str, **sizes: int) -> dict[str, Any]:
    """Megatron loads our distributed checkpoint at the present layout; returns its state."""
    common = torch.load(folder / "release" / "common.pt", weights_only=False)
    assert (common["iteration"], common["checkpoint_version"]) == (0, 3.0)
    model = gpt_model(vars(common["args"]), **sizes)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    sharded = model.sharded_state_dict()
    if norms == "te":  # the one key in which Transformer Engine's layers differ
        for name, entry in sharded.items():
            if "pre_mlp_layernorm" in name and f"{name.split('pre_mlp')[0]}mlp.router.weight" in sharded:
                entry.key = entry.key.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
    names = set(sharded)
    loaded = dist_checkpointing.load(sharded, str(folder / "release"))
    model.load_state_dict({name: loaded[name] for name in names})
    return model.state_dict()


def saved_by_megatron(
    folder: Path, name: str, kind: str = "", metadata: dict[str, Any] | None = None, **sizes: int
) -> None:
    """Megatron saves, at the present layout, what it loaded from our files; we read its file."""
    source = MemorySource(CONFIGS[name])
    state = rank_file(folder / f"{name} legacy{kind}")
    model = gpt_model(vars(state["args"]), **sizes)
    model.load_state_dict(state["model"])
    saved = folder / f"{name} {sizes} {sorted(metadata or {})}"
    if dist.get_rank() == 0:
        saved.mkdir()
    dist.barrier()
    common = {"args": state["args"], "iteration": 7, "checkpoint_version": 3.0}
    dist_checkpointing.save({**common, **model.sharded_state_dict(metadata=metadata)}, str(saved))
    back = megatron.open(saved)
    assert back.config == megatron.open(folder / f"{name} legacy").config
    assert_same(back, source)


def rank_main(rank: int, world: int, folder_name: str) -> None:
    folder = Path(folder_name)
    patch_megatron()
    torch.Tensor.cuda = lambda tensor: tensor  # of a tied head on another stage than the embedding
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    parallel()
    for name in CONFIGS:
        rank_files(folder / f"{name} legacy", name)
        logits(folder / f"{name} legacy", name)
        saved_by_megatron(folder, name)
    saved_by_megatron(folder, "mixtral", metadata={"singleton_local_shards": True})
    layouts = {
        "tp": {"tensor_model_parallel_size": 2},
        "pp": {"pipeline_model_parallel_size": 2},
        "ep": {"expert_model_parallel_size": 2},
    }
    for kind, sizes in layouts.items():
        parallel(**sizes)
        for name, config in CONFIGS.items():
            if (kind == "ep" and not config.moe_layers()) or (kind == "tp" and name == "qwen2"):
                continue
            legacy = folder / f"{name} legacy {kind}"
            rank_files(legacy, name, **sizes)
            if name in ("tied", "deepseek"):
                saved_by_megatron(folder, name, f" {kind}", **sizes)
            for norms in ("local",) if kind == "tp" else ("te",):
                state = loads_ours(folder / f"{name} torch_dist {norms}", norms, **sizes)
                for key, tensor in rank_file(legacy)["model"].items():
                    wanted = tensor if tensor is None else tensor[: state[key].shape[0]]
                    assert wanted is None or torch.equal(state[key][: wanted.shape[0]], wanted), (name, kind, key)
    leave_process_group()
