"""Regions: nothing without a listener, order and nesting with one, and which threads and backwards are heard."""

import threading
import time

import pytest
import torch

from dmoe.config import MoEConfig
from dmoe.moe import MoE
from dmoe.ops import regions
from dmoe.ops.regions import REGIONS, listening, region


class Heard:
    def __init__(self):
        self.log = []

    def enter(self, name):
        self.log.append(f"+{name}")

    def leave(self, name):
        self.log.append(f"-{name}")


def test_order_and_nesting():
    heard = Heard()
    with listening(heard), region("forward"):
        with region("routing"):
            pass
        with region("experts"):
            pass
    assert heard.log == ["+forward", "+routing", "-routing", "+experts", "-experts", "-forward"]


def test_nothing_is_heard_before_and_after():
    heard = Heard()
    with region("data"):
        pass
    with listening(heard):
        pass
    with region("data"):
        pass
    assert heard.log == []
    assert regions._listeners == []


def test_listeners_are_nested_around_each_other():
    first, second = Heard(), Heard()
    second.log = first.log  # one log for both
    with listening(first), listening(second), region("sync"):
        assert first.log == ["+sync", "+sync"]
    order = []
    first.leave = lambda name: order.append("first")
    second.leave = lambda name: order.append("second")
    with listening(first), listening(second), region("sync"):
        pass
    assert order == ["second", "first"]


def test_exception_leaves():
    heard = Heard()
    with pytest.raises(ValueError, match="oops"), listening(heard), region("forward"), region("experts"):
        raise ValueError("oops")
    assert heard.log == ["+forward", "+experts", "-experts", "-forward"]
    assert regions._listeners == []


def test_listener_that_comes_or_goes_within_a_region_hears_whole_regions():
    early, late = Heard(), Heard()
    stack = listening(early)
    with stack, region("backward"):
        with listening(late):
            inner = region("experts")
            inner.__enter__()
        inner.__exit__(None, None, None)
    assert early.log == ["+backward", "+experts", "-experts", "-backward"]
    assert late.log == ["+experts", "-experts"]


def test_other_threads_are_heard():
    heard = Heard()

    def work():
        with region("backward"):
            pass

    with listening(heard):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert heard.log == ["+backward", "-backward"]


def test_layer_names_its_parts_forward_and_backward():
    layer = MoE(MoEConfig(hidden_size=8, intermediate_size=4, num_experts=4, top_k=2))
    x = torch.randn(6, 8, requires_grad=True)
    heard = Heard()
    with listening(heard):
        y = layer(x)
        forward, heard.log = heard.log, []
        y.sum().backward()
    assert [entry for entry in forward if entry[0] == "+"] == ["+routing", "+experts"]
    assert heard.log == ["+experts", "-experts"]
    assert {entry[1:] for entry in forward} <= set(REGIONS)


def test_compiler_sees_no_region():
    def work(x):
        with region("forward"):
            return x + 1

    heard = Heard()
    compiled = torch.compile(work, backend="eager", fullgraph=True)
    with listening(heard):
        assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))
    assert heard.log == []


def test_silent_region_costs_a_function_call():
    """Far below a microsecond on any machine; the bound is for a busy one."""
    assert region("forward") is region("experts")  # nothing is made
    start = time.perf_counter()
    for _ in range(1000):
        with region("forward"):
            pass
    assert (time.perf_counter() - start) / 1000 < 5e-5
