"""Meeting the other ranks of this start, and none of an earlier one, in the store that torchrun's agent keeps.

torchrun may start its ranks again with the store of the start before, which still has the addresses of the dead ones.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist


def has_agent_store() -> bool:
    """Whether this process was started by torchrun, whose agent keeps a store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def agent_store(timeout: timedelta) -> dist.Store:
    """A connection to the agent's store; operations wait `timeout` at most."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=timeout)


def meet(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """A part of `store` that only the ranks of this start use. Collective.

    Rank 0 answers whoever calls until all have come, so what earlier ranks left is answered in vain. Counts of
    restarts would not do: each node has its own.

    Raises:
        TimeoutError: names the ranks that did not come.
        dist.DistError: rank 0 did not come.
    """
    call = uuid.uuid4().hex
    if rank > 0:
        store.set(f"dmoe/call/{rank}", call)
        store.wait([f"dmoe/answer/{call}"], timeout)
        meeting = store.get(f"dmoe/answer/{call}").decode()
        store.set(f"dmoe/{meeting}/came/{rank}", "")
        store.wait([f"dmoe/{meeting}/complete"], timeout)
        return dist.PrefixStore(f"dmoe/{meeting}", store)
    deadline = time.monotonic() + timeout.total_seconds()
    awaited = list(range(1, world_size))
    while awaited:
        if time.monotonic() > deadline:
            raise TimeoutError(f"did not come within {timeout.total_seconds():g} s: ranks {awaited}")
        for other in awaited:
            if store.check([f"dmoe/call/{other}"]):
                store.set(f"dmoe/answer/{store.get(f'dmoe/call/{other}').decode()}", call)
        time.sleep(0.05)
        awaited = [other for other in awaited if not store.check([f"dmoe/{call}/came/{other}"])]
    store.set(f"dmoe/{call}/complete", "")
    return dist.PrefixStore(f"dmoe/{call}", store)
