"""What a token's output owes to the rest of the batch: nothing but the rounding of another GEMM kernel.

On a CPU the matrix product picks its kernel by the number of rows, so that fp32 results change in the last bits with
the size of the batch (and of an expert's share of it). What holds for every CPU is asserted: same bits for the same
routing (see also tests/ops), and a tolerance of a few roundings when the batch grows.
"""

import pytest
import torch

from dmoe.moe import MoE, MoEConfig

TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def build(backend: str, dtype: torch.dtype) -> MoE:
    config = MoEConfig(hidden_size=64, intermediate_size=32, num_experts=8, top_k=2, backend=backend)
    layer = MoE(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        layer.router.weight.mul_(4)  # well-separated scores: rounding does not change which experts are chosen
    return layer


CASES = [("reference", d) for d in TOLERANCE] + [("torch", d) for d in TOLERANCE if d != torch.float64]


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
def test_a_shorter_batch_gives_the_same_outputs(backend: str, dtype: torch.dtype) -> None:
    layer = build(backend, dtype)
    x = torch.randn(64, 64).to(dtype)
    with torch.no_grad():
        whole = layer(x).double()
        for n in (1, 2, 5, 16, 33):
            error = (layer(x[:n]).double() - whole[:n]).norm(dim=1) / whole[:n].norm(dim=1)
            assert error.max() <= TOLERANCE[dtype], n


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
def test_the_order_of_the_batch_does_not_matter(backend: str, dtype: torch.dtype) -> None:
    layer = build(backend, dtype)
    x = torch.randn(64, 64).to(dtype)
    order = torch.randperm(64)
    with torch.no_grad():
        want, got = layer(x)[order].double(), layer(x[order]).double()
    assert ((got - want).norm(dim=1) / want.norm(dim=1)).max() <= TOLERANCE[dtype]


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
def test_same_bits_when_the_others_change_but_not_their_routing(backend: str, dtype: torch.dtype) -> None:
    """Scaling a token by a positive number keeps its experts; the tokens that were not scaled keep their bits."""
    layer = build(backend, dtype)
    x = torch.randn(64, 64).to(dtype)
    scaled = torch.rand(64) < 0.5
    other = torch.where(scaled.unsqueeze(1), x * 2, x)
    with torch.no_grad():
        assert torch.equal(layer.router(other).topk_ids_TK, layer.router(x).topk_ids_TK)
        assert torch.equal(layer(other)[~scaled], layer(x)[~scaled])


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_training_mode_computes_the_same_outputs(backend: str) -> None:
    layer = build(backend, torch.float32)
    x = torch.randn(20, 64)
    assert torch.equal(layer.train()(x), layer.eval()(x))
