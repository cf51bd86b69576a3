"""The model of a run on this rank: its parts, how they run forward and backward, and its share of each batch.

One process and many go through the same code: without a mesh there is one part, and sums over ranks are its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.config import RunConfig, TrainConfig
from dmoe.data import gather_windows
from dmoe.lora import load_base, make_trainable
from dmoe.models import Decoder
from dmoe.moe import LoadBalancer, LoadSummary, Recorder, set_aux_loss_scale
from dmoe.ops.regions import region
from dmoe.parallel import ParallelMesh, Pipeline, loss_function, parallelize
from dmoe.parallel.context import local_positions
from dmoe.parallel.fsdp import sum_over_replicas
from dmoe.parallel.layout import compile_layers
from dmoe.parallel.loss import IGNORED
from dmoe.train.device import autocast


@dataclass(frozen=True)
class Batch:
    """A rank's share of one or more micro-batches, one after the other along dim 0."""

    inputs: Tensor
    """[sequences, tokens]"""
    targets: Tensor
    """The same shape; `IGNORED` costs nothing."""
    mask: Tensor | None = None
    """The same shape, bool: False for padding, which is on the right of a sequence. None: no padding."""

    def chunk(self, num_chunks: int) -> list[Batch]:
        """Equal parts along dim 0."""
        masks = [None] * num_chunks if self.mask is None else self.mask.chunk(num_chunks)
        return [Batch(*parts) for parts in zip(self.inputs.chunk(num_chunks), self.targets.chunk(num_chunks), masks)]


class Engine:
    """Runs the parts of a model. `build_engine` makes it from a configuration.

    Args:
        parts: on their device. One, or with pipeline parallelism one for each stage of this rank.
        mesh: None for one process.
    """

    def __init__(
        self, parts: list[Decoder], train: TrainConfig, device: torch.device, mesh: ParallelMesh | None = None
    ) -> None:
        self.parts, self.train, self.device, self.mesh = parts, train, device, mesh
        self.loss = loss_function(parts[0].config.vocab_size, mesh)
        self.num_micro_batches = train.batch_size // train.micro_batch_size
        self.recorders = [Recorder(part) for part in parts]
        self.pipeline: Pipeline | None = None
        if mesh is not None and mesh.config.pp > 1:
            self.pipeline = Pipeline(parts, mesh, train, self.loss, device, autocast(train, device))
            for part, recorder in zip(parts, self.recorders):
                part.register_forward_hook(partial(_record, recorder))
        for part in parts:
            set_aux_loss_scale(part, 1 / self.num_micro_batches)
        self.balancer = LoadBalancer(parts)

    @property
    def parameters(self) -> list[Tensor]:
        """Trainable parameters of the parts."""
        return [p for part in self.parts for p in part.parameters() if p.requires_grad]

    @property
    def second_copy(self) -> Tensor | None:
        """The tied embedding of the last stage, which is also in the first."""
        last = self.parts[-1]
        tied = self.pipeline is not None and last.is_last and last.config.tie_embeddings
        return last.embed_tokens.weight if tied else None

    def batch(self, tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray | None = None) -> Batch:
        """This rank's share of the windows at `starts`, whole micro-batches in order.

        Args:
            lengths: targets of each window; those beyond are ignored. None: all.
        """
        size, seq_len = self.train.micro_batch_size, self.train.seq_len
        dp_rank, dp_size = (0, 1) if self.mesh is None else (self.mesh.dp_rank, self.mesh.dp_size)
        mine = np.arange(len(starts))
        if dp_size > 1:
            mine = mine.reshape(-1, dp_size, size // dp_size)[:, dp_rank].ravel()
        arrays = (
            gather_windows(tokens, starts[mine], seq_len)
            if lengths is None
            else _padded_windows(tokens, starts[mine], lengths[mine], seq_len)
        )
        if self.mesh is not None and self.mesh.config.cp > 1:
            columns = local_positions(seq_len, self.mesh.context.get_local_rank("cp"), self.mesh.config.cp)
            arrays = tuple(array[:, columns] for array in arrays)
        return Batch(*(array.to(self.device, non_blocking=True) for array in arrays))

    def forward_backward(self, batch: Batch) -> Tensor:
        """Accumulate the gradient of the mean loss over the batch of all ranks; returns this rank's share, fp64."""
        num_targets = self._count(batch.targets)
        if self.pipeline is not None:
            return self.pipeline.step(batch.inputs, batch.targets, num_targets, batch.mask).double()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        micro_batches = batch.chunk(self.num_micro_batches)
        for i, micro_batch in enumerate(micro_batches):
            if self.mesh is not None and self.mesh.config.dp_replicate > 1:
                sum_over_replicas(self.parts[0], i == len(micro_batches) - 1)
            with region("forward"):
                loss = self.micro_loss(micro_batch) / num_targets
            with region("backward"):
                loss.backward()
            total += loss.detach()
            self.recorders[0].update()
        return total

    def micro_loss(self, batch: Batch) -> Tensor:
        """Summed loss of one micro-batch of a whole model."""
        with autocast(self.train, self.device):
            return self.loss(self.parts[0](batch.inputs, batch.mask, right_padded=True), batch.targets)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """Summed loss over one micro-batch of all ranks, fp64. Sets the parts to evaluation mode and back."""
        modes = [part.training for part in self.parts]
        for part in self.parts:
            part.eval()
        if self.pipeline is not None:
            loss = self.pipeline.evaluate(batch.inputs, batch.targets, batch.mask)
        else:
            loss = self.micro_loss(batch)
        for part, mode in zip(self.parts, modes):
            part.train(mode)
        return self.sum_over_ranks(loss.double() / self.copies)

    @property
    def copies(self) -> int:
        """Ranks that get the same loss for the same tokens."""
        return 1 if self.mesh is None else self.mesh.config.tp

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Add up over all ranks, in place."""
        if self.mesh is not None:
            dist.all_reduce(values)
        return values

    def load_summaries(self) -> dict[str, LoadSummary]:
        """Statistics of every MoE layer of the model since `reset_statistics`. Collective over "pp"."""
        mine = {name: s for recorder in self.recorders for name, s in recorder.summary().items()}
        if self.pipeline is None or self.mesh is None:
            return mine
        gathered: list[dict[str, LoadSummary]] = [{}] * self.mesh.config.pp
        dist.all_gather_object(gathered, mine, group=self.mesh.dense.get_group("pp"))
        merged = {name: summary for part in gathered for name, summary in part.items()}
        return dict(sorted(merged.items(), key=lambda item: int(item[0].split(".")[1])))

    def reset_statistics(self) -> None:
        """Start the statistics anew."""
        for recorder in self.recorders:
            recorder.reset()

    def _count(self, targets: Tensor) -> Tensor | int:
        """Targets of the batch of all ranks that are not ignored."""
        count = (targets != IGNORED).sum().double()
        if self.mesh is None:
            return count.clamp_min(1)
        config = self.mesh.config
        return self.sum_over_ranks(count / (config.tp * config.pp)).round().clamp_min(1)


def build_engine(
    config: RunConfig, device: torch.device, mesh: ParallelMesh | None = None, *, read_base: bool = True
) -> Engine:
    """The model of `config` on this rank, with its initial weights: random, or those in `train.init_from`.

    Args:
        read_base: False where a checkpoint will replace them.

    Raises:
        ConfigError: layout and model, or model and `train.init_from`, do not fit.
    """
    train = config.train
    dtype = torch.float64 if train.precision == "fp64" else torch.float32
    if mesh is None:
        model = Decoder.on_meta(config.model).to(dtype)
        model.activation_checkpointing = train.activation_checkpointing
        if train.compile:
            compile_layers(model)
        parts = [model]
    else:
        cast = autocast(train, device)
        parts = parallelize(
            config.model, mesh, train, dtype=dtype, gather_dtype=torch.bfloat16 if cast._enabled else None
        )
    for part in parts:
        part.to_empty(device=device)
        part.init_weights(train.seed)
    if train.init_from and read_base:
        load_base(parts, Path(train.init_from))
    make_trainable(parts, train, mesh)
    return Engine(parts, train, device, mesh)


def _record(recorder: Recorder, part: Decoder, *_: object) -> None:
    """Several micro-batches are in flight in a pipeline, so each forward is recorded as it ends."""
    if part.training:
        recorder.update()


def _padded_windows(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, seq_len: int) -> tuple[Tensor, ...]:
    """Inputs, targets and mask, padded on the right."""
    inputs = np.zeros((len(starts), seq_len), dtype=np.int64)
    targets = np.full((len(starts), seq_len), IGNORED, dtype=np.int64)
    for row, (start, length) in enumerate(zip(starts, lengths)):
        inputs[row, :length] = tokens[start : start + length]
        targets[row, :length] = tokens[start + 1 : start + length + 1]
    mask = np.arange(seq_len) < np.asarray(lengths)[:, None]
    return torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(mask)
