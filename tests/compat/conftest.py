"""What layers save for their losses is global, as in MegaBlocks: no test leaves it to the next."""

from collections.abc import Iterator

import pytest

from dmoe.compat.megablocks.layers import moe, router


@pytest.fixture(autouse=True)
def _saved_losses() -> Iterator[None]:
    yield
    moe.clear_load_balancing_loss()
    router.clear_router_zloss()
