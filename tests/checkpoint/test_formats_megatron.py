"""Megatron's files against checkpoints put together by hand, in numpy, from its naming and splitting rules."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import itertools
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dmoe.checkpoint.formats import megatron
from dmoe.checkpoint.formats.megatron import flags, torch_files
from dmoe.config import ModelConfig, MoEConfig
from dmoe.errors import ConfigError, RunError

sys.path.insert(0, str(Path(__file__).parent))
from formats_megatron_cases import BASE, CONFIGS, MOE, MemorySource, assert_same, same_model

DIVISOR = 16
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
Arrays = dict[str, np.ndarray]


def split(array: np.ndarray, tp: int, rank: int, dim: int) -> np.ndarray:
    return np.split(array, tp, axis=dim)[rank]


def by_hand(
    source: MemorySource, t: int, p: int, e: int, tp: int, pp: int, ep: int, norms: str, experts: str
) -> Arrays:
    """A rank's state dict, by loops over groups, layers and experts."""
    config, ours = source.config, {name: tensor.numpy() for name, tensor in source.state.items()}
    moe, H, G = config.moe, config.head_dim, config.num_kv_heads
    padded = -(-config.vocab_size // (DIVISOR * tp)) * DIVISOR * tp
    result: Arrays = {}

    def vocabulary(array: np.ndarray) -> np.ndarray:
        zeros = np.zeros((padded - len(array), config.hidden_size), array.dtype)
        return split(np.concatenate([array, zeros]), tp, t, 0)

    def gated(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        return np.concatenate([split(gate, tp, t, 0), split(up, tp, t, 0)])

    embedding, head = ours["embed_tokens.weight"], ours.get("lm_head.weight", ours["embed_tokens.weight"])
    if p == 0:
        result["embedding.word_embeddings.weight"] = vocabulary(embedding)
    for n in range(config.num_layers // pp):
        layer, theirs = f"layers.{p * config.num_layers // pp + n}.", f"decoder.layers.{n}."
        is_moe = f"{layer}mlp.router.weight" in ours
        fused = norms == "te"
        first = "self_attention.linear_qkv.layer_norm_weight" if fused else "input_layernorm.weight"
        second = "mlp.linear_fc1.layer_norm_weight" if fused and not is_moe else "pre_mlp_layernorm.weight"
        result[theirs + first] = ours[f"{layer}input_layernorm.weight"]
        result[theirs + second] = ours[f"{layer}post_attention_layernorm.weight"]
        for leaf in ("weight", "bias") if config.qkv_bias else ("weight",):
            q, k, v = (ours[f"{layer}self_attn.{x}_proj.{leaf}"] for x in "qkv")
            rows = []
            for g in range(G):
                width = config.num_heads // G * H
                rows += [q[g * width : (g + 1) * width], k[g * H : (g + 1) * H], v[g * H : (g + 1) * H]]
            result[f"{theirs}self_attention.linear_qkv.{leaf}"] = split(np.concatenate(rows), tp, t, 0)
        result[f"{theirs}self_attention.linear_proj.weight"] = split(ours[f"{layer}self_attn.o_proj.weight"], tp, t, 1)
        if config.qk_norm == "head":
            for x in "qk":
                result[f"{theirs}self_attention.{x}_layernorm.weight"] = ours[f"{layer}self_attn.{x}_norm.weight"]
        networks = {"mlp.": "mlp."}
        if is_moe:
            networks = {"mlp.shared_experts.": "mlp.shared_experts."} if moe.shared_intermediate_size else {}
            result[f"{theirs}mlp.router.weight"] = ours[f"{layer}mlp.router.weight"]
            if moe.expert_bias_rate:
                result[f"{theirs}mlp.router.expert_bias"] = ours[f"{layer}mlp.router.e_score_correction_bias"]
            if moe.shared_expert_gate:
                result[f"{theirs}mlp.shared_experts.gate_weight"] = ours[f"{layer}mlp.shared_expert_gate.weight"]
            both, down = ours[f"{layer}mlp.experts.gate_up_proj"], ours[f"{layer}mlp.experts.down_proj"]
            F, E_l = moe.intermediate_size, moe.num_experts // ep
            fc1 = [gated(both[x, :F], both[x, F:]) for x in range(e * E_l, (e + 1) * E_l)]
            fc2 = [split(down[x], tp, t, 1) for x in range(e * E_l, (e + 1) * E_l)]
            for i, (one, two) in enumerate(zip(fc1, fc2)):
                if experts == "sequential":
                    result[f"{theirs}mlp.experts.local_experts.{i}.linear_fc1.weight"] = one
                    result[f"{theirs}mlp.experts.local_experts.{i}.linear_fc2.weight"] = two
                elif experts == "grouped":
                    result[f"{theirs}mlp.experts.linear_fc1.weight{i}"] = one
                    result[f"{theirs}mlp.experts.linear_fc2.weight{i}"] = two
            if experts == "weight1":
                flat = np.stack([w.T for w in fc1]), np.stack([w.T for w in fc2])
                result[f"{theirs}mlp.experts.weight1"] = flat[0].reshape(config.hidden_size, -1)
                result[f"{theirs}mlp.experts.weight2"] = flat[1].reshape(-1, config.hidden_size)
        for their_name, our_name in networks.items():
            gate, up, down = (ours[f"{layer}{our_name}{x}_proj.weight"] for x in ("gate", "up", "down"))
            result[f"{theirs}{their_name}linear_fc1.weight"] = gated(gate, up)
            result[f"{theirs}{their_name}linear_fc2.weight"] = split(down, tp, t, 1)
    if p == pp - 1:
        result["decoder.final_layernorm.weight"] = ours["norm.weight"]
        if not config.tie_embeddings or pp > 1:
            result["output_layer.weight"] = vocabulary(head)
    return result


LAYOUTS = [
    # tp, pp, ep, norms, experts
    (1, 1, 1, "te", "sequential"),
    (2, 1, 1, "local", "sequential"),
    (1, 2, 1, "te", "grouped"),
    (1, 1, 2, "te", "grouped"),
    (4, 2, 3, "local", "sequential"),
    (2, 1, 2, "te", "weight1"),
]


def args_of(config: ModelConfig, tp: int, pp: int, ep: int) -> argparse.Namespace:
    args = flags.to_args(config)
    padded = -(-config.vocab_size // (DIVISOR * tp)) * DIVISOR * tp
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "expert_model_parallel_size": ep}
    return argparse.Namespace(**args, **sizes, padded_vocab_size=padded, vocab_size=config.vocab_size)


def rank_name(t: int, p: int, e: int, pp: int, ep: int) -> str:
    return f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "") + (f"_{e:03d}" if ep > 1 else "")


@pytest.mark.parametrize(("tp", "pp", "ep", "norms", "experts"), LAYOUTS)
def test_rank_files(tp: int, pp: int, ep: int, norms: str, experts: str, tmp_path: Path):
    many = tp * pp * ep > 4  # files: one model, whose groups are fewer than the ranks
    for name, config in {"deepseek": CONFIGS["deepseek"]}.items() if many else CONFIGS.items():
        ep_here = ep if config.moe_layers() else 1
        source = MemorySource(config, seed=tp + 10 * ep)
        ours, theirs = tmp_path / f"{name} ours", tmp_path / f"{name} theirs"
        options: dict[str, Any] = {"norms": norms, "experts": experts, "vocab_divisor": DIVISOR}
        megatron.write(source, ours, files="legacy", tp=tp, pp=pp, ep=ep_here, iteration=12, **options)
        assert (ours / "latest_checkpointed_iteration.txt").read_text() == "12"
        theirs.mkdir()
        (theirs / "latest_checkpointed_iteration.txt").write_text("12\n")
        ranks = list(itertools.product(range(tp), range(pp), range(ep_here)))
        written = {path.name for path in (ours / "iter_0000012").iterdir()}
        assert written == {rank_name(t, p, e, pp, ep_here) for t, p, e in ranks}
        for t, p, e in ranks:
            wanted = by_hand(source, t, p, e, tp, pp, ep_here, norms, experts)
            file = Path("iter_0000012") / rank_name(t, p, e, pp, ep_here) / "model_optim_rng.pt"
            state = torch_files.load(ours / file)
            assert (state["checkpoint_version"], state["iteration"]) == (3.0, 12)
            got = {k: v for k, v in state["model"].items() if not k.endswith("_extra_state")}
            assert got.keys() == wanted.keys(), name
            for key, array in wanted.items():
                assert np.array_equal(got[key].numpy(), array), (name, key)
            (theirs / file).parent.mkdir(parents=True)
            model = {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in wanted.items()}
            args = args_of(config, tp, pp, ep_here)
            torch.save({"args": args, "model": model, "checkpoint_version": 3.0, "iteration": 12}, theirs / file)
        for folder in (theirs, ours, theirs / "iter_0000012"):
            assert megatron.is_one(folder)
            back = megatron.open(folder)
            assert same_model(back.config, config)
            assert_same(back, source)
        no_args(theirs / "iter_0000012", config)
        assert_same(megatron.open(theirs, config=config), source)


def no_args(folder: Path, config: ModelConfig) -> None:
    """Take the arguments out of the files: the configuration is then asked for."""
    for file in folder.glob("*/model_optim_rng.pt"):
        state = torch_files.load(file)
        torch.save({"model": {k: v.clone() for k, v in state["model"].items()}}, file)
    with pytest.raises(ConfigError, match="carries no arguments"):
        megatron.open(folder)


@pytest.mark.parametrize("norms", ["te", "local"])
def test_distributed_files(norms: str, tmp_path: Path):
    """Keys and shapes by the rules, content by plain DCP, and read again."""
    import torch.distributed.checkpoint as dcp

    for name, config in CONFIGS.items():
        source = MemorySource(config, dtype=torch.bfloat16)
        folder = tmp_path / name
        megatron.write(source, folder, norms=norms, vocab_divisor=DIVISOR)
        alike = len(config.moe_layers()) in (0, config.num_layers)
        wanted: dict[str, Tensor] = {}
        layers: dict[str, list[Tensor]] = {}
        for stored, array in by_hand_whole(source, norms).items():
            if not stored.startswith("decoder.layers."):
                wanted[stored] = array
            elif alike:
                layers.setdefault("decoder.layers." + stored.split(".", 3)[3], []).append(array)
            else:
                wanted[stored] = array
        wanted |= {key: torch.stack(tensors) for key, tensors in layers.items()}
        metadata = dcp.FileSystemReader(folder / "release").read_metadata().state_dict_metadata
        tensors = {key for key, entry in metadata.items() if hasattr(entry, "size")}
        assert tensors == wanted.keys(), name
        loaded = {key: torch.full_like(tensor, float("nan")) for key, tensor in wanted.items()}
        dcp.load(loaded, checkpoint_id=folder / "release", no_dist=True)
        for key, tensor in wanted.items():
            assert torch.equal(loaded[key], tensor), (name, key)
        back = megatron.open(folder)
        assert same_model(back.config, config)
        assert_same(back, source)


def by_hand_whole(source: MemorySource, norms: str) -> dict[str, Tensor]:
    """Under the keys of distributed checkpoints, each layer by itself, from the names of a rank that has all."""
    floats = MemorySource(source.config)
    floats.state = {name: tensor.float() for name, tensor in source.state.items()}
    result: dict[str, Tensor] = {}
    experts: dict[str, list[Tensor]] = {}
    for name, array in by_hand(floats, 0, 0, 0, 1, 1, 1, "local", "sequential").items():
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        tensor = tensor if name.endswith("expert_bias") else tensor.bfloat16()
        name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        if norms == "local" or name.replace("pre_mlp_layernorm", "mlp.router") not in moe_routers(source.config):
            name = name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
        if ".local_experts." in name:
            head, tail = name.split(".local_experts.")
            experts.setdefault(f"{head}.experts.{tail.split('.', 1)[1]}", []).append(tensor)
        else:
            result[name] = tensor
    return result | {key: torch.stack(tensors) for key, tensors in experts.items()}


def moe_routers(config: ModelConfig) -> set[str]:
    return {f"decoder.layers.{i}.mlp.router.weight" for i in config.moe_layers()}


def test_newer_files_without_common(tmp_path: Path):
    """Newer versions keep what is not a tensor in an object of the distributed checkpoint."""
    import torch.distributed.checkpoint as dcp

    source = MemorySource(CONFIGS["mixtral"])
    megatron.write(source, tmp_path / "ours", vocab_divisor=DIVISOR)
    old, new = tmp_path / "ours" / "release", tmp_path / "new"
    keys = dcp.FileSystemReader(old).read_metadata().state_dict_metadata
    tensors = {key: torch.empty(entry.size) for key, entry in keys.items() if hasattr(entry, "size")}
    dcp.load(tensors, checkpoint_id=old, no_dist=True)
    common = [torch_files.load(old / "common.pt")]
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(tensors | {"common_state/shard_0_1": common}, checkpoint_id=new, planner=planner, no_dist=True)
    (new / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    back = megatron.open(new)
    assert same_model(back.config, source.config)
    assert_same(back, source)


class Kind(enum.Enum):
    """Stands for the classes of Megatron's own that its arguments hold."""

    a = 1


class Evil:
    ran = False

    def __reduce__(self) -> Any:
        return (setattr, (Evil, "ran", True))


def test_foreign_objects_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # As Megatron-core does when it is imported.
    monkeypatch.setattr(torch._weights_only_unpickler, "_marked_safe_globals_set", {np.dtype, np.ndarray})
    generator = np.random.default_rng(0)
    state = {
        "args": argparse.Namespace(a=1, path=Path("/x"), kind=Kind.a, dtype=torch.bfloat16, evil=Evil(), name="n"),
        "rng_state": [{"np_rng_state": np.random.RandomState(0).get_state(), "n": generator.integers(3, size=3)}],
        "optimizer": {"defaults": Evil()},
        "model": {"w": torch.arange(3.0)},
    }
    torch.save(state, tmp_path / "x.pt")
    loaded = torch_files.load(tmp_path / "x.pt")
    assert not Evil.ran
    assert set(torch.serialization.get_safe_globals()) == {np.dtype, np.ndarray}
    assert torch_files.plain(loaded["args"]) == {"a": 1, "dtype": torch.bfloat16, "name": "n"}
    assert torch.equal(loaded["model"]["w"], torch.arange(3.0))
    for content, message in ((b"", "not a zip file|cannot be read"), (pickle.dumps(state), "not a zip file")):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(RunError, match=message):
            torch_files.load(tmp_path / "bad.pt")
    content = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "bad.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(RunError, match=r"bad\.pt"):
        torch_files.load(tmp_path / "bad.pt")


def read_all(path: Path) -> None:
    source = megatron.open(path)
    for name in source.names():
        source.read(name)


def test_damaged_rank_files(tmp_path: Path):
    source = MemorySource(CONFIGS["mixtral"])
    megatron.write(source, tmp_path / "x", files="legacy", tp=2, ep=2, vocab_divisor=DIVISOR)
    with pytest.raises(ConfigError, match="destination"):
        megatron.write(source, tmp_path / "x")
    folder = tmp_path / "x" / "release"
    file = folder / "mp_rank_01_001" / "model_optim_rng.pt"

    def refused(change: Any, message: str, error: type[Exception] = RunError) -> None:
        good = file.read_bytes()
        state = torch_files.load(file)
        state = {"args": state["args"], "model": {k: v if v is None else v.clone() for k, v in state["model"].items()}}
        change(state["model"])
        torch.save(state, file)
        with pytest.raises(error, match=message):
            read_all(tmp_path / "x")
        file.write_bytes(good)

    router = "decoder.layers.1.mlp.router.weight"
    refused(lambda m: m[router].mul_(2), "layers.1.mlp.router.weight differs from mp_rank_00_000")
    refused(lambda m: m.pop(router), "tensors are missing")
    refused(lambda m: m.pop("decoder.layers.0.mlp.experts.local_experts.2.linear_fc1.weight"), "are missing")
    with pytest.raises(RunError, match=r"the embedding has 64 rows"):
        megatron.open(tmp_path / "x", config=dataclasses.replace(source.config, vocab_size=65))
    refused(lambda m: m.update(more=torch.ones(2)), "not of this kind of model: mp_rank_01_001/model/more")
    name = "decoder.layers.0.mlp.experts.local_experts.2.linear_fc1.weight"
    refused(lambda m: m.update({name: m[name][:-2]}), "has shape")
    refused(lambda m: m.update(language_model={}), "older GPT", ConfigError)
    file.unlink()
    with pytest.raises(RunError, match="mp_rank_01_001"):
        megatron.open(tmp_path / "x")
    file.parent.rmdir()
    with pytest.raises(RunError, match=r"1 folders of ranks are missing: mp_rank_01_001"):
        megatron.open(tmp_path / "x")


def test_damaged_distributed_files(tmp_path: Path):
    source = MemorySource(CONFIGS["mixtral"])
    megatron.write(source, tmp_path / "x", vocab_divisor=DIVISOR)
    folder = tmp_path / "x" / "release"
    data = next(folder.glob("*.distcp"))
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2])
    with pytest.raises(RunError, match=r"__0_0\.distcp"):
        read_all(tmp_path / "x")
    with pytest.raises(RunError, match="tensors of the model are missing"):
        megatron.open(tmp_path / "x", config=dataclasses.replace(source.config, num_layers=3, qk_norm="head"))
    for change in ({"num_heads": 8}, {"num_layers": 1}, {"moe": dataclasses.replace(source.config.moe, num_experts=5)}):
        with pytest.raises(RunError, match="has shape"):
            megatron.open(tmp_path / "x", config=dataclasses.replace(source.config, **change))
    with pytest.raises(RunError, match=r"the embedding has 64 rows: must have model\.vocab_size \(65\)"):
        megatron.open(tmp_path / "x", config=dataclasses.replace(source.config, vocab_size=65))
    with pytest.raises(RunError, match=r"not of this kind of model: output_layer\.weight"):
        megatron.open(tmp_path / "x", config=dataclasses.replace(source.config, tie_embeddings=True))
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(RunError, match="zarr"):
        megatron.open(tmp_path / "x")
    (folder / "metadata.json").unlink()
    (tmp_path / "x" / "latest_checkpointed_iteration.txt").write_text("nonsense")
    with pytest.raises(RunError, match="says 'nonsense'"):
        megatron.open(tmp_path / "x")


def test_virtual_stages_and_uneven_ones(tmp_path: Path):
    """Layers that go round the ranks twice, and a first stage of its own size; both only read."""
    config = ModelConfig(**BASE | {"num_layers": 4}, moe=MoEConfig(**MOE))
    source = MemorySource(config)
    whole = by_hand(source, 0, 0, 0, 1, 1, 1, "te", "sequential")
    assignments = {
        # folder, key of the model, layers, first, last
        "virtual": [("000", "model0", [0], 1, 0), ("001", "model0", [1], 0, 0), ("000", "model1", [2], 0, 0),
                    ("001", "model1", [3], 0, 1)],
        "uneven": [("000", "model", [0], 1, 0), ("001", "model", [1, 2, 3], 0, 1)],
    }  # fmt: skip
    for name, parts in assignments.items():
        states: dict[str, Any] = {}
        for stage, key, layers, first, last in parts:
            model = {k: v for k, v in whole.items() if (first and "embedding" in k) or (last and "layers" not in k)}
            model = {k: v for k, v in model.items() if first or "embedding" not in k}
            for n, layer in enumerate(layers):
                prefix = f"decoder.layers.{layer}."
                found = {k: v for k, v in whole.items() if k.startswith(prefix)}
                model |= {f"decoder.layers.{n}.{k.removeprefix(prefix)}": v for k, v in found.items()}
            states.setdefault(stage, {})[key] = {k: torch.from_numpy(v.copy()) for k, v in model.items()}
        for stage, state in states.items():
            args = args_of(config, 1, 2, 1)
            args.decoder_first_pipeline_num_layers = 1 if name == "uneven" else None
            file = tmp_path / name / "iter_0000001" / f"mp_rank_00_{stage}" / "model_optim_rng.pt"
            file.parent.mkdir(parents=True)
            torch.save({"args": args, **state}, file)
        (tmp_path / name / "latest_checkpointed_iteration.txt").write_text("1")
        assert_same(megatron.open(tmp_path / name), source)


def test_bad_requests(tmp_path: Path):
    source = MemorySource(CONFIGS["mixtral"])
    for options, message in (
        ({"tp": 3}, "divisible by tensor parallelism"),
        ({"ep": 4}, "ep is 4: must be a divisor of the number of experts"),
        ({"pp": 3}, "pp is 3"),
        ({"tp": 0}, "tp is 0: must be at least 1"),
        ({"experts": "fused"}, "experts is 'fused'"),
        ({"norms": "apex"}, "norms is 'apex'"),
        ({"files": "zarr"}, "files is 'zarr'"),
        ({"iteration": -1}, "iteration is -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            megatron.write(source, tmp_path / "x", **{"files": "legacy", "vocab_divisor": 16} | options)
    assert not list(tmp_path.iterdir())
    assert not megatron.is_one(tmp_path)
    with pytest.raises(RunError, match="has no latest_checkpointed_iteration"):
        megatron.open(tmp_path)
