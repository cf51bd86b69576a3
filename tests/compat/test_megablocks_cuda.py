"""`megablocks.ops` and the grouped product on a GPU, against the same calls on the CPU."""

import pytest
import torch
from torch import Tensor

from dmoe.compat.megablocks import grouped_gemm_util as gg
from dmoe.compat.megablocks import ops

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none"),
]


def results(device: str, dtype: torch.dtype, tokens: int) -> dict[str, Tensor]:
    """Every operator, forward and backward, on inputs that depend on the seed alone."""
    torch.manual_seed(3)
    top_k, experts, width = 2, 7, 40
    # Expert 3 receives nothing.
    ids = torch.rand(tokens, experts).index_fill_(1, torch.tensor([3]), -1).topk(top_k).indices.flatten().int()
    x, y, weights = torch.randn(tokens, width), torch.randn(tokens, width), torch.rand(tokens * top_k)
    x, y, weights = (t.to(device, dtype).requires_grad_() for t in (x, y, weights))
    bin_ids, indices = ops.sort(ids.to(device), 3)
    counts = ops.histogram(bin_ids, experts)
    bins = ops.inclusive_cumsum(counts, 0)
    padded_bins = ops.inclusive_cumsum(ops.round_up(counts, 16), 0)
    out = {"bin_ids": bin_ids, "indices": indices, "bins": bins, "padded_bins": padded_bins}
    out["exclusive"] = ops.exclusive_cumsum(counts, 0)
    out["topology"] = ops.topology(padded_bins, 16, int(padded_bins[-1]) // 16, 3)
    out["replicated"] = ops.replicate(
        x.view(1, -1)[:, :experts] if tokens else x.new_zeros(1, experts), bins, tokens * 2
    )

    out["gathered"] = ops.gather(x, indices, bin_ids, bins, top_k)
    out["padded"] = ops.padded_gather(x, indices, bin_ids, bins, padded_bins, top_k)
    out["binned"] = ops.binned_gather(x, indices, bins, 5, top_k)
    out["scattered"] = ops.scatter(out["gathered"], indices, bin_ids, weights, bins, top_k)
    out["padded_scattered"] = ops.padded_scatter(out["padded"], indices, bin_ids, weights, bins, padded_bins, top_k)
    out["binned_scattered"] = ops.binned_scatter(out["binned"], indices, weights, bins, top_k)
    loss = sum((out[name] * y).sum() for name in ("scattered", "padded_scattered", "binned_scattered"))
    out["grad_x"], out["grad_weights"] = torch.autograd.grad(loss + out["replicated"].sum(), (x, weights))
    return {name: t.detach().cpu() for name, t in out.items()}


@pytest.mark.parametrize("tokens", [0, 1, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_operators(dtype: torch.dtype, tokens: int) -> None:
    got, want = results(DEVICE, dtype, tokens), results("cpu", dtype, tokens)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        if name.startswith("grad"):  # dot products and sums of several gradients, in another order
            tolerance = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(got[name], tensor, rtol=tolerance, atol=tolerance * 10)
        else:
            assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("where", ["cpu", DEVICE])
@pytest.mark.parametrize(("width", "columns"), [(64, 32), (9, 5)])  # one kernel, and a loop
@pytest.mark.parametrize("trans_b", [False, True])
def test_gmm(trans_b: bool, width: int, columns: int, where: str) -> None:
    sizes = torch.tensor([40, 0, 3, 17])
    b_shape = (4, columns, width) if trans_b else (4, width, columns)
    a, b = torch.randn(60, width).bfloat16(), torch.randn(b_shape).bfloat16()
    grad = torch.randn(60, columns).bfloat16()
    wide = [t.double().requires_grad_() for t in (a, b)]
    on_device = [t.to(DEVICE).requires_grad_() for t in (a, b)]
    want = gg.ops.gmm(*wide, sizes, trans_b)
    got = gg.ops.gmm(*on_device, sizes.to(where), trans_b)
    want.backward(grad.double())
    got.backward(grad.to(DEVICE))
    for ours, exact in ((got, want), (on_device[0].grad, wide[0].grad), (on_device[1].grad, wide[1].grad)):
        torch.testing.assert_close(ours.double().cpu(), exact, rtol=2**-7, atol=2**-5)
    assert not on_device[1].grad[1].any()
    out = gg.ops.gmm(on_device[0][:0], on_device[1], torch.zeros_like(sizes, device=where), trans_b)
    assert out.shape == (0, columns)
