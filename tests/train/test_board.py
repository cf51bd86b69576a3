"""What TensorBoard is given, read back with its own reader."""

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dmoe.observe.routing import RoutingAccumulator, RoutingSummary
from dmoe.train.board import Board, load_picture, together_picture


def record(layers: int, experts: int, step: int = 1) -> dict[str, Any]:
    loads = np.random.default_rng(0).dirichlet(np.ones(experts), layers)
    by_layer = {name: [0.5] * layers for name in ("max_over_mean", "router_entropy", "router_confidence")}
    return {
        "kind": "train", "step": step, "loss": 1.0, "moe_layers": list(range(layers)), "expert_load": loads.tolist(),
        "rank_load": [[0.6, 0.4]] * layers, "ep_imbalance": 1.2, "ep_imbalance_cost": 0.07, "dropped": [0.1] * layers,
        **by_layer,
    }  # fmt: skip


def evaluation(step: int = 1) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "loss": 1.0, "bits_per_byte": 1.0}


def read(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    found.Reload()
    return found


def summary(layers: int, experts: int) -> RoutingSummary:
    """Experts 0 and 1 are always picked together, the others by chance."""
    draw = np.random.default_rng(0)
    accumulator = RoutingAccumulator(list(range(layers)), experts, 2)
    for layer in range(layers):
        others = np.stack([2 + draw.permutation(experts - 2)[:2] for _ in range(300)])
        ids = np.where(np.arange(300)[:, None] % 3 == 0, [[0, 1]], others)
        accumulator.add(layer, ids, np.full((300, experts), 1 / experts), np.arange(300))
    return accumulator.summary(step=7)


def test_few_experts_have_curves(tmp_path: Path) -> None:
    board = Board(tmp_path, 0)
    board.write(record(2, 4))
    board.write(evaluation())
    board.close()
    found = read(tmp_path)
    scalars = found.Tags()["scalars"]
    assert {"train/ep_imbalance", "train/ep_imbalance_cost", "experts/router_confidence/layer_1"} <= set(scalars)
    assert {"experts/dropped/layer_0", "rank_load/layer_1/rank_1", "expert_load/layer_1/expert_3"} <= set(scalars)
    assert found.Scalars("train/ep_imbalance_cost")[0].value == pytest.approx(0.07)
    assert len(found.Tags()["images"]) == 1
    assert found.Tags()["histograms"] == []


def test_many_experts_do_not_flood_it(tmp_path: Path) -> None:
    board, start = Board(tmp_path, 0), time.process_time()
    for step in range(1, 11):
        board.write(record(32, 128, step))
    board.write(evaluation(10))
    assert time.process_time() - start < 5, "half a second a line"
    board.close()
    found = read(tmp_path)
    assert not [tag for tag in found.Tags()["scalars"] if tag.startswith("expert_load")]
    assert len(found.Tags()["histograms"]) == 32
    histogram = found.Histograms("expert_load_over_mean/layer_3")[0].histogram_value
    assert histogram.num == 128
    assert histogram.sum == pytest.approx(128)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 10 * 60_000


def test_broken_numbers_are_left_out(tmp_path: Path) -> None:
    board, broken = Board(tmp_path, 0), record(2, 200)
    broken |= {"loss": float("nan"), "ep_imbalance_cost": float("inf"), "expert_load": [[float("nan")] * 200] * 2}
    board.write(broken)
    board.write(evaluation())
    board.close()
    found = read(tmp_path)
    assert not {"train/loss", "train/ep_imbalance_cost"} & set(found.Tags()["scalars"])
    assert found.Tags()["histograms"] == []


@pytest.mark.parametrize(("layers", "experts"), [(1, 3), (3, 4), (32, 128), (5, 200)])
def test_picture_of_what_is_picked_together(layers: int, experts: int, tmp_path: Path) -> None:
    board = Board(tmp_path, 0)
    board.write_routing(summary(layers, experts))
    board.close()
    (tag,) = read(tmp_path).Tags()["images"]
    (event,) = read(tmp_path).Images(tag)
    assert event.step == 7
    assert len(event.encoded_image_string) < 400_000
    picture = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert picture.shape == together_picture(summary(layers, experts)).shape
    assert max(picture.shape) <= 700


def test_colours_say_what_is_picked_together() -> None:
    picture = together_picture(summary(1, 8), side=8)[2:-2, 2:-2].astype(int).sum(axis=2)
    assert picture.shape == (8, 8)
    assert picture[0, 1] == picture[1, 0] == picture.max()
    assert (picture[0, 2:] == picture.min()).all(), "never together"
    assert picture[2, 3] > picture.min()
    assert (np.diagonal(picture) == picture.min()).all()


def test_colours_say_who_is_busy() -> None:
    picture = load_picture([[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]]).astype(int).sum(axis=2)
    rows, columns = picture.shape
    cells = picture[rows // 4 :: rows // 2, columns // 8 :: columns // 4]
    assert cells.shape == (2, 4)
    assert cells[0, 0] > cells[0, 1] == cells[0, 2] > cells[0, 3]
    assert (cells[1] == cells[0, 1]).all()
