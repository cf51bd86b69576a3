"""The cost of uneven ranks against a step that is put together from its parts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dmoe.config import MoEConfig, ParallelConfig, ProfilingConfig, RunConfig
from dmoe.models import get_preset
from dmoe.train.imbalance import ImbalanceCost, expert_flops_share, lost_share, measured_part


@pytest.mark.parametrize("busiest", [(1.0, 1.0), (1.5, 1.1), (4.0, 2.0)])
@pytest.mark.parametrize("experts", [0.0, 0.3, 1.0])
def test_lost_share(busiest: tuple[float, float], experts: float) -> None:
    """Two layers, each with half of the experts' part of a balanced step of one second."""
    rest = 1 - experts
    step = rest + sum(m * experts / 2 for m in busiest)
    m = sum(busiest) / 2
    assert lost_share(m, experts) == pytest.approx((step - 1) / step)
    assert lost_share(m, 0.123, measured=(step - rest) / step) == pytest.approx((step - 1) / step)


def test_flops_share_by_hand() -> None:
    config = get_preset("tiny-moe")  # D 128, F 192, gated, 2 of 8 experts, 4 layers, tied vocabulary of 2048, no bias
    experts = 4 * 2 * 3 * 128 * 192
    attention = 4 * (2 * 128 * 128 + 2 * 128 * 64 + 2 * 64)  # q and o, k and v of one head, norms of heads
    norms, router = 9 * 128, 4 * 8 * 128
    products = 2 * 2 * 64 * 4 * (32 / 2)  # heads * (key + value) * layers * keys that a query sees of 32
    total = 6 * (experts + attention + norms + router + 2048 * 128) + 6 * products
    assert expert_flops_share(config, 32) == pytest.approx(6 * experts / total, rel=1e-12)
    assert expert_flops_share(get_preset("tiny-dense"), 32) == 0.0
    every = replace(config, moe=MoEConfig(intermediate_size=192, num_experts=2, top_k=2))
    assert 0 < expert_flops_share(every, 32) < 1


def test_measured_part(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    assert measured_part(path) is None
    regions = {"experts": [0.2, 0.4], "exchange": [0.1, 0.3], "forward": [0.7, 0.3]}
    path.write_text(json.dumps({"ranks": 2, "regions": regions, "step_seconds": [1.0, 1.0]}))
    assert measured_part(path) == pytest.approx(0.5)
    for broken in ("", "[]", "{}", '{"regions": {}}', '{"regions": {"experts": [1], "exchange": [1]}}',
                   '{"regions": {"experts": [1], "exchange": [1]}, "step_seconds": [0]}',
                   '{"regions": {"experts": [], "exchange": []}, "step_seconds": []}'):  # fmt: skip
        path.write_text(broken)
        assert measured_part(path) is None, broken


def test_of_a_run(tmp_path: Path) -> None:
    config = RunConfig(model=get_preset("tiny-moe"), parallel=ParallelConfig(ep=2))
    share = expert_flops_share(config.model, config.train.seq_len)
    assert ImbalanceCost(config, tmp_path)(1.5) == pytest.approx(lost_share(1.5, share))
    timeline = tmp_path / "profiling" / "timeline" / "summary.json"
    timeline.parent.mkdir(parents=True)
    timeline.write_text('{"regions": {"experts": [0.2], "exchange": [0.4]}, "step_seconds": [1.0]}')
    assert ImbalanceCost(config, tmp_path)(1.5) == pytest.approx(lost_share(1.5, share)), "an old file"
    watched = replace(config, profiling=ProfilingConfig(timeline=True))
    assert ImbalanceCost(watched, tmp_path)(1.5) == pytest.approx(0.6 / 3)
