"""What TensorBoard gets of a run: curves, histograms of the load, and pictures of the routing at each validation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from dmoe.observe.routing import RoutingSummary

MAX_SCALARS = 256
"""Curves for single experts, at most; with more experts there is a histogram of each layer in their place."""
# Scalars of a "train" record.
_SCALARS = (
    "loss", "aux_loss", "z_loss", "lr", "grad_norm", "tokens_per_second", "step_seconds", "model_tflops", "mfu",
    "memory_gib", "skipped_steps", "ep_imbalance", "ep_imbalance_cost",
)  # fmt: skip
# One for each MoE layer.
_BY_LAYER = ("max_over_mean", "router_entropy", "router_confidence", "dead_experts", "dropped")
# Dark to light; equal steps are about equally far apart to the eye.
_COLORS = np.array([[13, 8, 60], [84, 16, 109], [160, 50, 95], [224, 100, 50], [250, 170, 40], [252, 250, 190]])

Array = np.ndarray[Any, np.dtype[Any]]


class Board:
    """Event files in `folder`. What a run that is continued had logged after `start_step` is hidden."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=start_step + 1)
        self._last_load: list[list[float]] = []

    def write(self, record: dict[str, Any]) -> None:
        """A record of metrics.jsonl."""
        if record["kind"] == "train":
            self._write_training(record)
        if record["kind"] == "eval":
            self._writer.add_scalar("eval/loss", record["loss"], record["step"])
            self._writer.add_scalar("eval/bits_per_byte", record["bits_per_byte"], record["step"])
            if self._last_load:  # of the last lines of training; not at each of them, which would be large
                self._image("experts/load (layers down, experts across)", load_picture(self._last_load), record["step"])

    def write_routing(self, summary: RoutingSummary) -> None:
        """How a piece of the held-out text is routed."""
        tag = "experts/picked together (a square a layer; black: never, middle: as by chance)"
        self._image(tag, together_picture(summary), summary.step)

    def close(self) -> None:
        self._writer.close()

    def _write_training(self, record: dict[str, Any]) -> None:
        step = record["step"]
        for name in _SCALARS:
            if name in record and math.isfinite(record[name]):
                self._writer.add_scalar(f"train/{name}", record[name], step)
        layers, loads = record.get("moe_layers", []), record.get("expert_load", [])
        self._last_load = loads
        for i, layer in enumerate(layers):
            for name in _BY_LAYER:
                if name in record:
                    self._writer.add_scalar(f"experts/{name}/layer_{layer}", record[name][i], step)
            for rank, share in enumerate(record["rank_load"][i] if self._few(record.get("rank_load")) else []):
                self._writer.add_scalar(f"rank_load/layer_{layer}/rank_{rank}", share, step)
            if self._few(loads):
                for expert, share in enumerate(loads[i]):
                    self._writer.add_scalar(f"expert_load/layer_{layer}/expert_{expert}", share, step)
            elif np.isfinite(loads[i]).all():
                over_mean = np.array(loads[i]) * len(loads[i])
                self._writer.add_histogram(f"expert_load_over_mean/layer_{layer}", over_mean, step, bins=30)

    @staticmethod
    def _few(rows: list[list[float]] | None) -> bool:
        return rows is not None and sum(map(len, rows)) <= MAX_SCALARS

    def _image(self, tag: str, picture_HW3: Array, step: int) -> None:
        self._writer.add_image(tag, picture_HW3, step, dataformats="HWC")


def load_picture(loads: list[list[float]]) -> Array:
    """uint8 [height, width, 3]: a row for each layer, a column for each expert; the lightest have twice the mean load
    or more."""
    loads_LE = np.array(loads)
    return _colored(_enlarged(loads_LE * loads_LE.shape[1] / 2, 320, 640))


def together_picture(summary: RoutingSummary, side: int = 96) -> Array:
    """uint8 [height, width, 3]: for each layer a square of about `side`, tiled, of how often two experts are picked for
    the same token. Black is never or unknown, the middle of the scale as often as by chance, the lightest 4 times that.
    Where a square has more experts than points, a point shows the largest value of its experts."""
    num_layers, columns = len(summary.layers), math.ceil(math.sqrt(len(summary.layers)))
    tiles = []
    for i in range(num_layers):
        lift_EE = np.nan_to_num(summary.coactivation_lift(i), nan=0.0)
        scaled_EE = np.log2(np.clip(lift_EE, 0.25, 4.0)) / 4 + 0.5
        tiles.append(np.pad(_colored(_enlarged(_shrunk(scaled_EE, side), side, side)), ((2, 2), (2, 2), (0, 0))))
    tiles += [np.zeros_like(tiles[0])] * (-num_layers % columns)
    rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
    return np.concatenate(rows, axis=0)


def _shrunk(values: Array, side: int) -> Array:
    """At most `side` rows and columns, each the largest of a block."""
    block = math.ceil(len(values) / side)
    values = np.pad(values, (0, -len(values) % block))
    return np.asarray(values.reshape(len(values) // block, block, -1, block).max(axis=(1, 3)))


def _enlarged(values: Array, height: int, width: int) -> Array:
    """Each value as a block of points, so that the picture is at most so large, or as it is."""
    rows, columns = values.shape
    return np.repeat(np.repeat(values, max(1, height // rows), axis=0), max(1, width // columns), axis=1)


def _colored(values: Array) -> Array:
    """Colours of values from 0 to 1; beyond, and where they are not finite, those of the ends."""
    at = np.clip(np.nan_to_num(values, nan=0.0), 0, 1) * (len(_COLORS) - 1)
    low = np.minimum(at.astype(int), len(_COLORS) - 2)
    part = (at - low)[..., np.newaxis]
    return np.asarray((_COLORS[low] * (1 - part) + _COLORS[low + 1] * part).round().astype(np.uint8))
