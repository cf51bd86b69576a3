"""dmoe: dropless mixture-of-experts language models in plain PyTorch.

`from dmoe import MoE, MoEConfig` is the layer, `dmoe.from_pretrained` loads a model, and `dmoe --help` is the toolkit.
Importing the package loads nothing, not even torch, until a name is used: the command line can answer `--help` and set
thread options first.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["MoE", "MoEConfig", "__version__", "from_pretrained"]

if TYPE_CHECKING:
    from dmoe.checkpoint.formats import from_pretrained
    from dmoe.config import MoEConfig
    from dmoe.moe import MoE


def __getattr__(name: str) -> Any:
    if name == "MoE":
        from dmoe.moe import MoE

        return MoE
    if name == "MoEConfig":
        from dmoe.config import MoEConfig

        return MoEConfig
    if name == "from_pretrained":
        from dmoe.checkpoint.formats import from_pretrained

        return from_pretrained
    raise AttributeError(f"module 'dmoe' has no attribute {name!r}")
