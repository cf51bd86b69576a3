"""How a fixed piece of the held-out text is routed, kept at each validation: RUN/routing/step-00000400.npz."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from dmoe.checkpoint import ranks
from dmoe.config import RunConfig
from dmoe.data import Dataset, sequential_windows
from dmoe.errors import RunError
from dmoe.moe import moe_layers
from dmoe.observe.routing import Capture, LayerRouting, RoutingAccumulator, RoutingSummary, capture, save
from dmoe.train.engine import Engine

MAX_FILES = 20
"""Kept of a run: the first, the last, and others at about even distances."""
_NAME = re.compile(r"step-(\d{8,})\.npz")

Array = np.ndarray[Any, np.dtype[Any]]


class RoutingProbe:
    """Routes the first `profiling.routing_tokens` tokens of the held-out text and keeps a `RoutingSummary` of it.

    The forwards are extra ones, in evaluation mode and without gradients, whole micro-batches like those of a
    validation; random numbers are as if they had not been. The summary is the one that a single process would get,
    whatever the layout, but for rounding, and for routing rules that look at the tokens of one rank (capacity,
    "expert_choice"). All ranks make one and call `summary` and `save` together; rank 0 writes.

    Args:
        step: steps done. Files of later steps are deleted: they are of a run that was given up when this one went back
            to a checkpoint.
    """

    def __init__(self, config: RunConfig, run_dir: Path, data: Dataset, engine: Engine, step: int) -> None:
        self._config, self._engine, self._tokens = config, engine, data.val.tokens
        self._folder = run_dir / "routing"
        self._layers = config.model.moe_layers() if config.profiling.routing else []
        ranks.on_main(lambda: _delete_after(self._folder, step))

    def save(self, step: int) -> RoutingSummary | None:
        """Write the summary for `step`. Returns it on rank 0; None elsewhere, and where there is nothing to keep.

        Raises:
            RunError: the disk refuses.
        """
        parts = self._route() if self._layers else []
        made: list[RoutingSummary] = []

        def write() -> None:
            made.append(self._summarize(parts, step))
            save(self._folder / f"step-{step:08d}.npz", made[0])
            thin_out(self._folder)

        if self._layers:
            ranks.on_main(write)
        return made[0] if made else None

    def _route(self) -> list[_Part]:
        """On rank 0 the routing of every layer by every rank that has it and tokens; elsewhere nothing."""
        own: dict[int, list[_Part]] = {layer: [] for layer in self._layers}
        with contextlib.ExitStack() as stack:
            device = self._engine.device
            stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
            parts = [part for part in self._engine.parts if moe_layers(part)]
            captured = [stack.enter_context(capture(part)) for part in parts]
            for starts, lengths in probe_windows(len(self._tokens), self._config):
                self._engine.evaluate(self._engine.batch(self._tokens, starts, lengths))
                places_T = self._places(starts, lengths)
                for layer, routing in _taken(captured).items():
                    own[layer].append(_Part.of(layer, places_T, routing))
        # A layer at a time, so that no message is large.
        return [part for layer in self._layers for part in _gather_on_main(own[layer])]

    def _places(self, starts: Array, lengths: Array) -> Array:
        """int64 [T]: where in the text the tokens are that this rank's MoE layers see, in their order, padding too."""
        # Routed through the same code as the tokens themselves, so that every layout is followed.
        places = np.arange(int((starts + lengths).max()) + 1, dtype=np.int64)
        places_BS = self._engine.batch(places, starts, lengths).inputs
        return self._engine.parts[0].moe_columns(places_BS).flatten().cpu().numpy()

    def _summarize(self, parts: list[_Part], step: int) -> RoutingSummary:
        moe = self._config.model.moe
        accumulator = RoutingAccumulator(self._layers, moe.num_experts, moe.top_k)
        for layer in self._layers:
            of_layer = [part for part in parts if part.layer == layer]
            width = max(part.ids_TK.shape[1] for part in of_layer)
            ids_TK = np.concatenate([_widened(part.ids_TK, width, moe.num_experts) for part in of_layer])
            places_T = np.concatenate([part.places_T for part in of_layer])
            probs_TE = np.concatenate([part.probs_TE for part in of_layer])
            order = places_T.argsort()
            token_ids_T = np.asarray(self._tokens)[places_T[order]].astype(np.int64)
            dropped = sum(part.dropped for part in of_layer)
            accumulator.add(layer, ids_TK[order], probs_TE[order], token_ids_T, dropped=dropped)
        return accumulator.summary(step=step, name=self._folder.parent.name)


class _Part(NamedTuple):
    """How T tokens of one rank were routed by a layer, on the CPU, without padding."""

    layer: int
    places_T: Array
    ids_TK: Array
    probs_TE: Array
    dropped: int

    @classmethod
    def of(cls, layer: int, places_T: Array, routing: LayerRouting) -> _Part:
        valid_T = routing.valid_T
        assert valid_T is not None  # the windows have lengths
        ids_TK, probs_TE = routing.ids_TK[valid_T].to(torch.int32).cpu(), routing.probs_TE[valid_T].cpu()
        dropped = 0 if routing.dropped is None else int(routing.dropped)
        return cls(layer, places_T[valid_T.cpu().numpy()], ids_TK.numpy(), probs_TE.numpy(), dropped)


def probe_windows(num_tokens: int, config: RunConfig) -> list[tuple[Array, Array]]:
    """(starts, lengths) of each micro-batch of the piece; windows of length 0 fill the last one up."""
    seq_len, size, wanted = config.train.seq_len, config.train.micro_batch_size, config.profiling.routing_tokens
    first = sequential_windows(num_tokens, seq_len)[: -(-wanted // seq_len)]
    windows = [(start, min(length, wanted - start)) for start, length in first]
    windows += [(0, 0)] * (-len(windows) % size)
    pairs = np.array(windows, dtype=np.int64).reshape(-1, size, 2)
    return [(batch[:, 0], batch[:, 1]) for batch in pairs]


def probe_files(folder: Path) -> dict[int, Path]:
    """The summaries in `folder` by step, rising; none if there is no such folder."""
    files = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    found = ((_NAME.fullmatch(path.name), path) for path in files)
    return dict(sorted((int(match[1]), path) for match, path in found if match is not None))


def thin_out(folder: Path, most: int = MAX_FILES) -> None:
    """Delete files until `most` are left: each time the one whose neighbours are closest, never the first or last."""
    files = probe_files(folder)
    while len(files) > max(most, 2):
        steps = list(files)
        gap_of = {step: after - before for before, step, after in zip(steps, steps[1:], steps[2:])}
        _delete(files.pop(min(gap_of, key=lambda step: gap_of[step])))


def _delete_after(folder: Path, step: int) -> None:
    for at, path in probe_files(folder).items():
        if at > step:
            _delete(path)


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"{path}: cannot be deleted: {error.strerror}") from error


def _taken(captured: list[Capture]) -> Mapping[int, LayerRouting]:
    return {layer: routing for part in captured for layer, routing in part.take().items()}


def _gather_on_main(parts: list[_Part]) -> list[_Part]:
    """The parts of all ranks on rank 0; nothing elsewhere."""
    if not ranks.is_distributed():
        return parts
    received: list[list[_Part]] | None = [[] for _ in range(ranks.size())] if ranks.rank() == 0 else None
    dist.gather_object(parts, received, dst=0)
    return [part for of_rank in received or [] for part in of_rank]


def _widened(ids_TK: Array, width: int, no_expert: int) -> Array:
    return np.pad(ids_TK, ((0, 0), (0, width - ids_TK.shape[1])), constant_values=no_expert)
