"""`install()`: the name `megablocks` for this package, so that code written for MegaBlocks runs unchanged.

    from dmoe.compat.megablocks.installation import install

    install()
    import megablocks.layers.dmoe  # dmoe.compat.megablocks.layers.dmoe, the same module

Without a change to the code: `python -m dmoe.compat.megablocks SCRIPT` (see `__main__`).

What is not provided: the extension module `megablocks_ops`, the raw kernels beneath `megablocks.ops`, which are called
through that alone; the packages `stk` and `grouped_gemm`, which are not needed; a distribution `megablocks`, so
`importlib.metadata.version("megablocks")` raises PackageNotFoundError, as without MegaBlocks (`megablocks.__version__`
has the release whose interface this is).
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterator
from types import ModuleType

from dmoe.errors import ConfigError

ALIAS = "megablocks"
PACKAGE = "dmoe.compat.megablocks"
# One runs the process, the other imports `megablocks`.
_NOT_REGISTERED = ("__main__", "path_entry")


def _modules(package: ModuleType) -> Iterator[ModuleType]:
    """The package and all modules beneath it, imported."""
    yield package
    for entry in pkgutil.iter_modules(package.__path__):
        if entry.name in _NOT_REGISTERED:
            continue
        module = importlib.import_module(f"{package.__name__}.{entry.name}")
        if entry.ispkg:
            yield from _modules(module)
        else:
            yield module


def _alias(name: str) -> str:
    return ALIAS + name.removeprefix(PACKAGE)


def _refuse_other_megablocks() -> None:
    for name, module in list(sys.modules.items()):
        if module is None or name.split(".")[0] != ALIAS:
            continue
        if module is not sys.modules.get(PACKAGE + name.removeprefix(ALIAS)):
            origin = getattr(module, "__file__", None) or "unknown file"
            raise ConfigError(
                f"{name} is {origin}: must not be imported before install(). Call install() before the first import "
                "of megablocks, or start with `python -m dmoe.compat.megablocks SCRIPT`"
            )


def install() -> ModuleType:
    """Register this package and each of its modules under the name `megablocks` in `sys.modules`.

    The modules are the same objects under both names, and so are their classes, functions and module-level lists. A
    MegaBlocks that is installed but not imported is hidden for this process. May be called again, and does nothing
    then.

    Returns:
        the package.

    Raises:
        ConfigError: another `megablocks` is imported already; its classes would be mixed with ours.
    """
    _refuse_other_megablocks()
    package = importlib.import_module(PACKAGE)
    # All are imported before the first is registered: half a package under the name would be worse than none.
    modules = list(_modules(package))
    for module in modules:
        sys.modules[_alias(module.__name__)] = module
    return package
