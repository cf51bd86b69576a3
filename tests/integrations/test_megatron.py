"""Our layer in megatron-core: the config, the spec, and on two gloo ranks the numbers (megatron_worker.py)."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.nn.functional as F
from ranks import run_ranks

from dmoe.config import MoEConfig
from dmoe.errors import ConfigError
from dmoe.integrations import megatron as integration
from dmoe.integrations.megatron_config import COMPUTED, REFUSED, SAME, WITHOUT_EFFECT, moe_config

sys.path.insert(0, str(Path(__file__).parent))
import megatron_launch

BASE: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64, "moe_ffn_hidden_size": 24,
    "num_moe_experts": 6, "add_bias_linear": False, "gated_linear_unit": True, "activation_func": F.silu,
}  # fmt: skip


@pytest.fixture(scope="module")
def core() -> Any:
    """The config class of megatron-core, imported without its calls of the compiler, which take seconds."""
    with mock.patch("torch.compile", lambda function, **_: function):
        return pytest.importorskip(
            "megatron.core.transformer.transformer_config", reason="megatron-core is not installed (extra dev)"
        )


def transformer_config(core: Any, **overrides: Any) -> Any:
    return core.TransformerConfig(**BASE | overrides)


def test_the_module_imports_without_megatron_and_says_when_it_is_not_there():
    code = """
import sys
sys.modules["megatron"] = None
from dmoe.integrations.megatron import get_dmoe_module_spec
try:
    get_dmoe_module_spec()
except Exception as error:
    print(type(error).__name__, error)
"""
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.stdout.startswith("ConfigError megatron-core cannot be imported"), done.stderr
    assert "pip install megatron-core" in done.stdout


def test_no_field_of_megatron_is_overlooked(core: Any):
    fields = {field.name for field in dataclasses.fields(core.TransformerConfig)}
    listed = [*SAME, *COMPUTED, *REFUSED, *WITHOUT_EFFECT]
    assert len(listed) == len(set(listed))
    assert set(listed) <= fields
    assert {name for name in fields if name.startswith("moe_")} <= set(listed)
    assert {ours for ours, _ in SAME.values()} <= {field.name for field in dataclasses.fields(MoEConfig)}


def test_fields_are_taken_over(core: Any):
    assert moe_config(transformer_config(core)) == MoEConfig(
        hidden_size=32, intermediate_size=24, num_experts=6, top_k=2, aux_loss_coef=0.0, z_loss_coef=0.0
    )
    config = transformer_config(
        core, moe_router_topk=4, moe_router_score_function="sigmoid", moe_router_topk_scaling_factor=2.5,
        moe_router_num_groups=3, moe_router_group_topk=2, moe_router_dtype="fp64", moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=0.002, moe_input_jitter_eps=0.1, moe_z_loss_coeff=0.01,
        moe_router_load_balancing_type=["seq_aux_loss", "global_aux_loss"], moe_aux_loss_coeff=[0.1, 0.2],
        moe_shared_expert_intermediate_size=40, moe_shared_expert_gate=True, moe_latent_size=16,
        gated_linear_unit=False, activation_func=F.relu,
    )  # fmt: skip
    assert moe_config(config) == MoEConfig(
        hidden_size=32, intermediate_size=24, num_experts=6, top_k=4, score_function="sigmoid", n_group=3, topk_group=2,
        routed_scaling_factor=2.5, router_dtype="fp64", expert_bias_rate=0.002, jitter_eps=0.1, z_loss_coef=0.01,
        aux_loss_coef=0.0, seq_aux_loss_coef=0.1, global_aux_loss_coef=0.2, shared_intermediate_size=40,
        shared_expert_gate=True, latent_size=16, gated=False, activation="relu",
    )  # fmt: skip
    config = transformer_config(
        core, moe_expert_capacity_factor=1.5, moe_token_drop_policy="position", moe_pad_expert_input_to_capacity=True,
        moe_router_pre_softmax=True, add_bias_linear=True, moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.5,
    )  # fmt: skip
    assert moe_config(config) == MoEConfig(
        hidden_size=32, intermediate_size=24, num_experts=6, capacity_factor=1.5, drop_policy="position",
        pad_to_capacity=True, norm_topk_prob=False, bias=True, router_bias=True, aux_loss_coef=0.0, z_loss_coef=0.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("moe_router_force_load_balancing", True, "False"),
        ("moe_router_load_balancing_type", "sinkhorn", "one of none, aux_loss"),
        ("moe_apply_probs_on_input", True, "False"),
        ("cuda_graph_impl", "local", "none"),
        ("fp8", "hybrid", "None"),
        ("activation_func", F.mish, "silu"),
        ("activation_func", lambda x: x, "silu"),
        ("activation_func_clamp_value", 3.0, "None"),
        ("glu_linear_offset", 1.0, "0.0"),
        ("num_moe_experts", None, "number of experts"),
        ("overlap_moe_expert_parallel_comm", True, "False"),
    ],
)
def test_what_cannot_be_honoured_is_an_error(core: Any, field: str, value: Any, message: str):
    config = transformer_config(core)
    setattr(config, field, value)  # afterwards: its own checks ask for a GPU or for other libraries
    with pytest.raises(ConfigError, match=rf"TransformerConfig\.{field} is .*: must be .*{message}"):
        moe_config(config)


def test_combinations_that_cannot_be_honoured(core: Any):
    from megatron.core.activations import quick_gelu

    config = transformer_config(core, activation_func=quick_gelu)
    with pytest.raises(ConfigError, match=r"activation_func_clamp_value is None: must be 7\.0 with quick_gelu"):
        moe_config(config)
    config = transformer_config(core, add_bias_linear=True, moe_shared_expert_intermediate_size=40)
    with pytest.raises(ConfigError, match="add_bias_linear is True: must be False with moe_shared_expert_inter"):
        moe_config(config)
    config = transformer_config(core, recompute_granularity="selective")
    config.recompute_modules = ["shared_experts"]
    with pytest.raises(ConfigError, match="recompute_modules"):
        moe_config(config)


def test_specs(core: Any):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    moe, dense = get_gpt_layer_local_spec(num_experts=6), get_gpt_layer_local_spec()
    ours = integration.use_dmoe(moe, backend="torch")
    assert ours.submodules.mlp.module is integration.DMoELayer
    assert ours.submodules.mlp.params["backend"] == "torch"
    assert ours.submodules.self_attention is moe.submodules.self_attention
    assert moe.submodules.mlp.module is MoELayer, "the spec that was passed in has changed"
    with pytest.raises(ConfigError, match=r"mlp is 'MLP': must be MoELayer"):
        integration.use_dmoe(dense)
    block = integration.use_dmoe(TransformerBlockSubmodules(layer_specs=[dense, moe], layer_norm=object))
    assert [layer.submodules.mlp.module for layer in block.layer_specs] == [MLP, integration.DMoELayer]
    assert block.layer_norm is object
    with pytest.raises(ConfigError, match="MoELayer somewhere"):
        integration.use_dmoe(TransformerBlockSubmodules(layer_specs=[dense]))


def test_two_ranks(core: Any, tmp_path: Path):
    run_ranks(megatron_launch.run_rank, (str(tmp_path),), 2)
