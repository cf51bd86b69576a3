"""Every layout reports the routing that one process has: statistics of training, and the summary of held-out text."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

sys.path.insert(0, str(Path(__file__).parent))
import routing_cases
import routing_worker


@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", [2, 4])
def test_layouts(world: int, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    expected: dict[str, Any] = {}
    starved = []
    for name, case in routing_cases.CASES[world].items():
        ep, padded = case.parallel.get("ep", 1), case.moe.get("pad_to_capacity", False)
        alone = routing_cases.config_of(case.alone, tmp_path)
        expected[name] = routing_cases.expected_statistics(alone, ep, padded=padded)
        _, summary = routing_cases.run_case(alone, tmp_path / "alone" / name, spread=False)
        assert summary is not None
        assert summary.num_tokens == routing_cases.TOKENS
        starved.append((summary.load_LE == 0).any())
    assert any(starved), "experts without tokens"
    if world == 4:
        hides = expected["ep 4"]["layers.1.mlp"]
        assert hides["rank_max_over_mean"] > 1.001 * hides["max_of_sum"], "the busiest rank must change"
    run_ranks(routing_worker.rank_main, (world, str(tmp_path), expected), world)
    failures = (tmp_path / "failures").read_text()
    assert not failures, failures
