"""Pipeline parallel: layers over "pp", with the schedules of torch.distributed.pipelining."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from dmoe.config import V_SCHEDULES, ModelConfig, ParallelConfig, TrainConfig
from dmoe.models import Decoder
from dmoe.ops.regions import region
from dmoe.parallel.grad_norm import local_gradients
from dmoe.parallel.loss import LossFunction
from dmoe.parallel.mesh import ParallelMesh

_SCHEDULES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved_1f1b": "Interleaved1F1B",
    "looped_bfs": "LoopedBFS",
    "interleaved_zero_bubble": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble",
    "dualpipev": "DualPipeV",
}


def local_stages(config: ParallelConfig, rank: int) -> list[int]:
    """Stages of a rank: every pp-th one, or for the schedules in the shape of a V the rank-th from both ends."""
    if config.schedule in V_SCHEDULES:
        return [rank, 2 * config.pp - 1 - rank]
    return [rank + i * config.pp for i in range(config.num_local_stages)]


def stage_owners(config: ParallelConfig) -> list[int]:
    """The rank in "pp" of every stage."""
    owner = {stage: rank for rank in range(config.pp) for stage in local_stages(config, rank)}
    return [owner[stage] for stage in range(len(owner))]


def stage_layers(num_layers: int, num_stages: int) -> list[range]:
    """Layers of each stage, as even as can be. The first and the last also hold embedding and head, so that where the
    numbers do not divide the middle ones get more."""
    sizes = [num_layers // num_stages] * num_stages
    from_the_middle = sorted(range(num_stages), key=lambda i: (abs(2 * i - (num_stages - 1)), i))
    for i in from_the_middle[: num_layers % num_stages]:
        sizes[i] += 1
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [range(end - size, end) for end, size in zip(ends, sizes)]


def split_stages(config: ModelConfig, mesh: ParallelMesh) -> list[Decoder]:
    """This rank's parts of the model, on the meta device; one whole model without pipeline parallelism."""
    if mesh.config.pp == 1:
        return [Decoder.on_meta(config)]
    num_stages = mesh.config.pp * mesh.config.num_local_stages
    layers = stage_layers(config.num_layers, num_stages)
    stages = local_stages(mesh.config, mesh.dense.get_local_rank("pp"))
    return [_cut(Decoder.on_meta(config), layers[i], first=i == 0, last=i == num_stages - 1) for i in stages]


def _cut(model: Decoder, layers: range, *, first: bool, last: bool) -> Decoder:
    """Leave a model some layers, under their own names."""
    model.layers = nn.ModuleDict({str(i): model.layers[i] for i in layers})  # type: ignore[assignment]
    model.is_first, model.is_last = first, last
    if not last:
        del model.norm, model.lm_head
    if not first and not (last and model.config.tie_embeddings):
        del model.embed_tokens
    return model


class _Stage(PipelineStage):
    """Names the regions of a step. Between them a stage waits for its neighbours."""

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with region("forward"):
            return super().forward_one_chunk(*args, **kwargs)

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with region("backward"):
            return super().backward_one_chunk(*args, **kwargs)

    def backward_weight_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with region("backward"):
            return super().backward_weight_one_chunk(*args, **kwargs)


class Pipeline:
    """Runs the parts of this rank forward and backward over the micro-batches of a step."""

    def __init__(
        self, parts: list[Decoder], mesh: ParallelMesh, train: TrainConfig, loss: LossFunction, device: torch.device,
        autocast: torch.autocast,
    ) -> None:  # fmt: skip
        config, group = mesh.config, mesh.dense.get_group("pp")
        self.is_first, self.is_last = (any(getattr(p, end) for p in parts) for end in ("is_first", "is_last"))
        self._mesh, self._parts, self._loss = mesh, parts, loss
        self._scale: Tensor | float = 1.0
        num_stages = config.pp * config.num_local_stages
        numbers = local_stages(config, mesh.dense.get_local_rank("pp"))
        for part in parts:
            # Around each forward alone: a backward must not run under autocast. Batches are padded on the right; the
            # schedules of older torch pass nothing but tensors on.
            part.forward = autocast(partial(part.forward, right_padded=True))  # type: ignore[method-assign]
        outlines = [_outlines(part, mesh, train, autocast) for part in parts]
        self.part_of_stage = {i: (part, outline[0]) for i, part, outline in zip(numbers, parts, outlines)}
        self.stages = [
            _Stage(part, i, num_stages, device, *outline, group=group)
            for i, part, outline in zip(numbers, parts, outlines)
        ]
        schedule: Any = get_schedule_class(_SCHEDULES[config.schedule])
        self._schedule = schedule(
            self.stages if config.num_local_stages > 1 else self.stages[0],
            train.batch_size // train.micro_batch_size,
            loss_fn=self._scaled_loss,
            scale_grads=False,
        )
        self._tied_pair = _tied_pair(mesh) if parts[0].config.tie_embeddings else None

    def _scaled_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        with region("forward"):
            return self._loss(logits, targets) / self._scale

    def step(
        self, inputs_BS: Tensor, targets_BS: Tensor, num_targets: Tensor | float, mask_BS: Tensor | None = None
    ) -> Tensor:
        """Forward and backward over a whole step's micro-batches, in order along dim 0.

        Args:
            mask_BS: bool, False for padding, which is on the right.

        Returns:
            sum of the losses over this rank's tokens, divided by `num_targets`; 0 where the last stage is elsewhere.
        """
        self._scale = num_targets
        losses: list[Tensor] = []
        self._schedule.step(
            *((inputs_BS,) if self.is_first else ()),
            target=targets_BS if self.is_last else None,
            losses=losses if self.is_last else None,
            return_outputs=False,
            **({} if mask_BS is None else {"attention_mask": mask_BS}),
        )
        if self._tied_pair is not None:
            self._sum_tied_gradients()
        return torch.stack([x.detach() for x in losses]).sum() if losses else inputs_BS.new_zeros((), dtype=torch.float)

    @torch.no_grad()
    def evaluate(self, inputs_BS: Tensor, targets_BS: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """Sum of the losses of one micro-batch; 0 where the last stage is elsewhere.

        One stage after the other: the schedules' own evaluation does not know stages in a V or split backwards.
        """
        group, config = self._mesh.dense.get_group("pp"), self._mesh.config
        owners = stage_owners(config)
        x, loss = inputs_BS, torch.zeros((), device=inputs_BS.device)
        for stage, owner in enumerate(owners):
            if owner != group.rank():
                continue
            part, shape = self.part_of_stage[stage]
            if stage > 0 and owners[stage - 1] != owner:
                x = torch.empty(shape.shape, dtype=shape.dtype, device=inputs_BS.device)
                dist.recv(x, group=group, group_src=owners[stage - 1])
            x = part(x, mask_BS)
            if part.is_last:
                loss = self._loss(x, targets_BS)
            elif owners[stage + 1] != owner:
                dist.send(x.contiguous(), group=group, group_dst=owners[stage + 1])
        return loss

    def _sum_tied_gradients(self) -> None:
        """The embedding is in the first stage and, as the head, in the last: both take the sum of their gradients."""
        ends = [p.embed_tokens.weight for p in self._parts if p.is_first or p.is_last]
        gradients = [gradient for _, gradient in local_gradients(ends)]
        if len(gradients) == 2:  # the ends of a V
            total = gradients[0] + gradients[1]
            for gradient in gradients:
                gradient.copy_(total)
        elif gradients:
            dist.all_reduce(gradients[0], group=self._tied_pair)


def _outlines(part: Decoder, mesh: ParallelMesh, train: TrainConfig, autocast: torch.autocast) -> tuple[Tensor, Tensor]:
    """What goes into and comes out of a stage for one micro-batch, as meta tensors.

    Without them the pipeline would learn the shapes by running every stage once, on memory that nobody has written.
    """
    config = mesh.config
    sequences, tokens = train.micro_batch_size // mesh.dp_size, train.seq_len // config.cp
    dtype = next(part.parameters()).dtype
    split = config.tp if config.tp > 1 and config.sequence_parallel else 1
    hidden = torch.empty(
        sequences, tokens // split, part.config.hidden_size, dtype=dtype, device="meta", requires_grad=True
    )
    ids = torch.empty(sequences, tokens, dtype=torch.int64, device="meta")
    logits_dtype = autocast.fast_dtype if autocast._enabled else dtype
    width = part.config.vocab_size
    if config.tp > 1 and config.loss_parallel:
        size = -(-width // config.tp)
        width = max(0, min(size, width - size * mesh.dense.get_local_rank("tp")))
    logits = torch.empty(sequences, tokens, width, dtype=logits_dtype, device="meta", requires_grad=True)
    return ids if part.is_first else hidden, logits if part.is_last else hidden


def _tied_pair(mesh: ParallelMesh) -> dist.ProcessGroup | None:
    """The group of this pipeline's first and last rank. Collective over all ranks."""
    # pp is the outermost axis. Not read from the mesh's tensor, which holds nothing while a run is planned.
    num_pipelines = dist.get_world_size() // mesh.config.pp
    pairs = [[rank, rank + (mesh.config.pp - 1) * num_pipelines] for rank in range(num_pipelines)]
    groups = [dist.new_group(pair) for pair in pairs]
    mine = [group for pair, group in zip(pairs, groups) if dist.get_rank() in pair]
    return mine[0] if mine else None
