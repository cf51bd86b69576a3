"""What a record says of the experts."""

import dataclasses

import pytest

from dmoe.moe import LoadSummary
from dmoe.train.metrics import format_line, load_fields


def summary(dropped: int) -> LoadSummary:
    return LoadSummary(
        tokens_per_expert=[30, 10], load=[0.75, 0.25], max_over_mean=1.5, dead_experts=0, router_entropy=0.6,
        aux_loss=1.1, z_loss=0.2, dropped=dropped,
    )  # fmt: skip


def test_dropped_picks_are_never_silent() -> None:
    record = {
        "kind": "train",
        "step": 1,
        "loss": 1.0,
        "lr": 1.0,
        "grad_norm": 1.0,
        "tokens_per_second": 1.0,
        "mfu": 0.5,
    }
    fields = load_fields({"layers.1.mlp": summary(10), "layers.3.mlp": summary(0)})
    assert fields["dropped"] == [0.25, 0.0]
    assert fields["moe_layers"] == [1, 3]
    assert format_line(record | fields, 9).endswith("busiest expert 1.50x  dropped 12.5%")
    dropless = load_fields({"layers.1.mlp": summary(0)})
    assert "dropped" not in dropless
    assert "dropped" not in format_line(record | dropless, 9)
    assert load_fields({}) == {}


def test_ranks_of_expert_parallelism() -> None:
    uneven = dataclasses.replace(summary(0), confidence=0.7, rank_load=[0.75, 0.25], rank_max_over_mean=1.6)
    even = dataclasses.replace(summary(0), confidence=0.4, rank_load=[0.5, 0.5], rank_max_over_mean=1.2)
    fields = load_fields({"layers.1.mlp": uneven, "layers.3.mlp": even}, lambda imbalance: imbalance / 10)
    assert fields["router_confidence"] == [0.7, 0.4]
    assert fields["rank_load"] == [[0.75, 0.25], [0.5, 0.5]]
    assert fields["ep_imbalance"] == pytest.approx(1.4)
    assert fields["ep_imbalance_cost"] == pytest.approx(0.14)
    alone = load_fields({"layers.1.mlp": summary(0)}, lambda imbalance: imbalance)
    assert not {"rank_load", "ep_imbalance", "ep_imbalance_cost"} & alone.keys()
