"""The benchmark of routing statistics, on two pairs of steps."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import routing_overhead as bench

from dmoe.errors import ConfigError
from dmoe.models import Decoder
from dmoe.moe import batch_sums, moe_layers
from dmoe.train.engine import Engine


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    assert bench.main(["--smoke", "--json", str(path)]) == 0
    results = json.loads(path.read_text())["results"]
    assert [(r["size"], r["losses"]) for r in results] == [("tiny", True), ("tiny", False)]
    assert all(len(r["seconds"]["with"]) == len(r["seconds"]["without"]) == 2 for r in results)
    assert capsys.readouterr().out.count("overhead") == 2
    with pytest.raises(ConfigError, match="--sizes is 'huge'"):
        bench.main(["--sizes", "huge"])


def test_without_means_that_nothing_is_recorded() -> None:
    config, seq_len, sequences = bench.build("tiny", losses=False)
    train = bench.TrainConfig(batch_size=sequences, micro_batch_size=sequences, seq_len=seq_len, precision="fp32")
    model = Decoder(config)
    engine, computed = Engine([model], train, torch.device("cpu")), batch_sums.decisiveness
    layers = list(moe_layers(model).values())
    kept = [layer.stats for layer in layers]
    with bench.without_statistics(engine):
        assert all(layer.stats is None for layer in layers)
        assert batch_sums.decisiveness is bench.no_decisiveness
    assert [layer.stats for layer in layers] == kept
    assert batch_sums.decisiveness is computed
