"""The layer inside Megatron-core's transformer block.

    layer_spec = use_dmoe(get_gpt_layer_local_spec(num_experts=8, normalization="RMSNorm"))
    model = GPTModel(config, layer_spec, vocab_size, max_sequence_length)

Written for megatron-core 0.16.1. Nothing of it is imported before a function of this module is called.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dmoe.config import require
from dmoe.errors import ConfigError

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import ModuleSpec

    from dmoe.config import Backend
    from dmoe.integrations.megatron_layer import DMoELayer

__all__ = ["DMoELayer", "get_dmoe_module_spec", "use_dmoe"]


def __getattr__(name: str) -> Any:
    if name == "DMoELayer":
        _import_megatron()
        from dmoe.integrations.megatron_layer import DMoELayer

        return DMoELayer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _import_megatron() -> None:
    try:
        import megatron.core  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"megatron-core cannot be imported ({error}): pip install megatron-core==0.16.1") from error


def get_dmoe_module_spec(
    *,
    backend: Backend | None = None,
    precision: str = "same",
    exchange: str = "same",
    max_rows: int = 0,
    pg_collection: ProcessGroupCollection | None = None,
) -> ModuleSpec:
    """A spec for the `mlp` of a layer spec, in the place of `get_moe_module_spec`'s.

    Args:
        backend, precision: as in `MoEConfig`.
        exchange, max_rows: `payload` and `max_rows` of `AllToAllDispatcher`, which expert parallelism uses.
        pg_collection: process groups. None: Megatron's global ones.

    Raises:
        ConfigError: megatron-core is not installed.
    """
    _import_megatron()
    from megatron.core.transformer.spec_utils import ModuleSpec

    from dmoe.integrations.megatron_layer import DMoELayer

    options = {"backend": backend, "precision": precision, "exchange": exchange, "max_rows": max_rows}
    if pg_collection is not None:
        options["pg_collection"] = pg_collection
    return ModuleSpec(module=DMoELayer, params=options, metainfo={"fuse_pre_mlp_layernorm": False})


def use_dmoe(spec: Any, **options: Any) -> Any:
    """A copy of `spec` whose mixture-of-experts layers are ours; the rest is shared with `spec`.

    Args:
        spec: a layer spec, as `get_gpt_layer_local_spec(num_experts=...)` returns it; or the submodules of a whole
            block, as `get_gpt_decoder_block_spec` returns them, whose dense layers stay as they are.
        options: passed to `get_dmoe_module_spec`.

    Raises:
        ConfigError: nothing in `spec` is a mixture of experts.
    """
    ours = get_dmoe_module_spec(**options)
    if hasattr(spec, "layer_specs"):
        layers = [_with_mlp(layer, ours) if _is_moe(layer) else layer for layer in spec.layer_specs]
        require(any(map(_is_moe, spec.layer_specs)), "spec.layer_specs", _mlps(spec.layer_specs), "MoELayer somewhere")
        return replace(spec, layer_specs=layers)
    require(_is_moe(spec), "spec.submodules.mlp", _mlps([spec])[0], "MoELayer: give num_experts to the layer spec")
    return _with_mlp(spec, ours)


def _is_moe(layer_spec: Any) -> bool:
    from megatron.core.transformer.moe.moe_layer import BaseMoELayer

    module = getattr(getattr(layer_spec.submodules, "mlp", None), "module", None)
    return isinstance(module, type) and issubclass(module, BaseMoELayer)


def _with_mlp(layer_spec: Any, mlp: Any) -> Any:
    changed = copy.copy(layer_spec)
    changed.submodules = replace(layer_spec.submodules, mlp=mlp)
    return changed


def _mlps(layer_specs: list[Any]) -> list[str]:
    modules = [getattr(getattr(layer.submodules, "mlp", None), "module", None) for layer in layer_specs]
    return [getattr(module, "__name__", str(module)) for module in modules]
