"""`megablocks.grouped_gemm_util` against loops in float64; the small modules of `megablocks.layers`."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from dmoe.compat.megablocks import grouped_gemm_util as gg
from dmoe.compat.megablocks.layers import activation_fn, common, gelu, mpu
from dmoe.errors import ConfigError

SIZES = {
    "uneven": [3, 0, 5, 1],
    "first and last empty": [0, 4, 0],
    "one group": [6],
    "no rows": [0, 0],
}
every_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())


def inputs(sizes: list[int], k: int = 4, n: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(sum(sizes), k).to(dtype), torch.randn(len(sizes), k, n).to(dtype)


def by_loop(a: Tensor, b: Tensor, sizes: list[int]) -> Tensor:
    out, row = torch.zeros(len(a), b.shape[2], dtype=torch.float64), 0
    for e, size in enumerate(sizes):
        for _ in range(size):
            out[row] = a[row].double() @ b[e].double()
            row += 1
    return out


@every_size
def test_gmm(sizes: list[int]) -> None:
    a, b = inputs(sizes)
    batch_sizes = torch.tensor(sizes)
    want = by_loop(a, b, sizes)
    transposed = b.transpose(1, 2).contiguous()
    torch.testing.assert_close(gg.ops.gmm(a, b, batch_sizes), want)
    torch.testing.assert_close(gg.ops.gmm(a, transposed, batch_sizes, True), want)
    torch.testing.assert_close(gg.ops.gmm(a.t().contiguous().t(), b, batch_sizes.int()), want)
    torch.testing.assert_close(gg.backend.gmm(a, transposed, batch_sizes, trans_b=True), want)
    outer, row = torch.zeros(len(sizes), 4, 3, dtype=torch.float64), 0
    for e, size in enumerate(sizes):
        for _ in range(size):
            outer[e] += torch.outer(a[row], want[row])
            row += 1
    out = torch.full_like(outer, torch.nan)
    assert gg.backend.gmm(a, want, batch_sizes, trans_a=True, c=out) is out
    torch.testing.assert_close(out, outer)
    torch.testing.assert_close(gg.backend.gmm(a, want, batch_sizes, trans_a=True), outer)


@every_size
@pytest.mark.parametrize("trans_b", [False, True])
def test_gmm_gradients(sizes: list[int], trans_b: bool) -> None:
    a, b = inputs(sizes)
    b = b.transpose(1, 2).contiguous() if trans_b else b
    batch_sizes = torch.tensor(sizes)
    product = partial(gg.ops.gmm, batch_sizes=batch_sizes, trans_b=trans_b)
    for frozen in ("none", "a", "b"):
        a.requires_grad_(frozen != "a")
        b.requires_grad_(frozen != "b")
        if sum(sizes):
            assert gradcheck(product, (a, b))
        elif frozen != "b":
            product(a, b).sum().backward()
            assert b.grad is None or (b.grad.shape == b.shape and not b.grad.any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gmm_dtypes(dtype: torch.dtype) -> None:
    sizes = SIZES["uneven"]
    a, b = inputs(sizes, 16, 8, dtype)
    got = gg.ops.gmm(a, b, torch.tensor(sizes))
    assert got.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), by_loop(a, b, sizes), rtol=tolerance, atol=tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        assert gg.ops.gmm(a, b, torch.tensor(sizes)).dtype == torch.bfloat16


def test_the_grouped_kernel_gives_what_the_loop_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken on a GPU for bf16; torch runs it here too."""
    sizes = SIZES["uneven"]
    a, b = (t.requires_grad_() for t in inputs(sizes, 16, 8, torch.bfloat16))
    batch_sizes = torch.tensor(sizes)
    results = []
    kernel, calls = F.grouped_mm, []
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **kw: calls.append(1) or kernel(*args, **kw))
    for grouped in (False, True):
        monkeypatch.setattr(gg, "_runs_grouped", lambda a, b, grouped=grouped: grouped)
        out = gg.ops.gmm(a, b, batch_sizes)
        results.append([out, *torch.autograd.grad(out.square().sum(), (a, b))])
        assert len(calls) == 3 * grouped
    for loop, grouped_result in zip(*results):
        torch.testing.assert_close(loop, grouped_result, rtol=2**-7, atol=2**-7)
    assert not results[1][2][1].any()  # the gradient of an empty group
    assert gg._aligned(a)
    assert not gg._aligned(torch.empty(4, 9, dtype=torch.bfloat16))


def test_gmm_errors() -> None:
    a, b = inputs([2, 3])
    for field, call in (
        ("the sum of batch_sizes", lambda: gg.ops.gmm(a, b, torch.tensor([2, 2]))),
        ("the least of batch_sizes", lambda: gg.ops.gmm(a, b, torch.tensor([6, -1]))),
        ("batch_sizes.dtype", lambda: gg.ops.gmm(a, b, torch.tensor([2.0, 3.0]))),
        ("b.shape", lambda: gg.ops.gmm(a, b, torch.tensor([2, 3]), trans_b=True)),
        ("b.dtype", lambda: gg.ops.gmm(a, b.float(), torch.tensor([2, 3]))),
        ("trans_a, trans_b", lambda: gg.backend.gmm(a, b, torch.tensor([2, 3]), True, True)),
        ("c", lambda: gg.backend.gmm(a, b, torch.tensor([2, 3]), c=torch.empty(5, 2))),
    ):
        with pytest.raises(ConfigError, match=f"^{field} is .* must be "):
            call()
    assert gg.grouped_gemm_is_available()
    gg.assert_grouped_gemm_is_available()


class Matrix:
    """The constructor and the attributes of stk.Matrix."""

    def __init__(self, size: tuple[int, int], data: Tensor, *topology: int) -> None:
        self._size, self.data, self.topology = size, data, topology
        names = ("row_indices", "column_indices", "offsets", "column_indices_t", "offsets_t", "block_offsets_t")
        for name, value in zip(names, topology, strict=True):
            setattr(self, name, value)

    def size(self) -> tuple[int, int]:
        return self._size


def test_gelu_and_activations_on_tensors_and_matrices() -> None:
    x = torch.randn(3, 4, 4, dtype=torch.float64) * 2
    slope = x.clone().requires_grad_()
    want = 0.5 * slope * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (slope + 0.044715 * slope**3)))
    want.sum().backward()
    matrix = Matrix((8, 6), x, 1, 2, 3, 4, 5, 6)
    torch.testing.assert_close(gelu.gelu(x), want.detach())
    got = gelu.gelu(matrix)
    assert isinstance(got, Matrix)
    assert (got.size(), got.topology) == ((8, 6), (1, 2, 3, 4, 5, 6))
    torch.testing.assert_close(got.data, want.detach())

    grad = torch.full_like(x, 3.0)
    assert gelu.gelu_backward_(grad, x) is grad
    torch.testing.assert_close(grad, 3 * slope.grad)
    grads = Matrix((8, 6), torch.full_like(x, 3.0), 1, 2, 3, 4, 5, 6)
    kept = grads.data
    assert gelu.gelu_backward_(grads, matrix).data is kept
    torch.testing.assert_close(kept, 3 * slope.grad)

    assert torch.equal(activation_fn.act_fn(x, F.relu), x.relu())
    assert torch.equal(activation_fn.act_fn(matrix, F.leaky_relu, negative_slope=0.5).data, F.leaky_relu(x, 0.5))
    for inputs_, data in ((x.clone(), None), (Matrix((8, 6), x.clone(), 1, 2, 3, 4, 5, 6), "data")):
        with torch.no_grad():
            out, grad_fn = activation_fn.act_fn(inputs_, F.gelu, return_grad_fn=True, approximate="tanh")
        leaf, values = (inputs_, out) if data is None else (inputs_.data, out.data)
        torch.testing.assert_close(values.detach(), want.detach())
        grad_fn(torch.full_like(x, 2.0))
        torch.testing.assert_close(leaf.grad, 2 * slope.grad)


def test_dtype_and_autocast() -> None:
    chosen = [common.dtype(SimpleNamespace(fp16=f, bf16=b)) for f, b in ((1, 0), (1, 1), (0, 1), (0, 0))]
    assert chosen == [torch.float16, torch.float16, torch.bfloat16, None]
    x = torch.ones(2)
    assert common.cast_if_autocast_enabled(x) is x
    with torch.autocast("cpu", torch.bfloat16):
        assert common.cast_if_autocast_enabled(x).dtype == torch.bfloat16
        assert common.cast_if_autocast_enabled(x.double()).dtype == torch.float64
        assert common.cast_if_autocast_enabled(x.int()).dtype == torch.int32


def arguments(experts: int, features: int) -> SimpleNamespace:
    return SimpleNamespace(
        moe_num_experts=experts,
        ffn_hidden_size=features,
        moe_expert_model_parallelism=True,
        expert_parallel_group=None,
    )


@pytest.mark.parametrize(
    ("world", "experts", "features", "want"),
    [(1, 8, 6, (1, 1, 8, 6)), (4, 8, 6, (4, 1, 2, 6)), (8, 4, 6, (4, 2, 4 // 4, 3)), (6, 1, 6, (1, 6, 1, 1))],
)
def test_shares_of_experts_and_features(
    world: int, experts: int, features: int, want: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(experts, features)
    monkeypatch.setattr(mpu.dist, "get_world_size", lambda group: world)
    functions = (mpu.expert_sharding_degree, mpu.hidden_sharding_degree, mpu.experts_per_rank, mpu.features_per_rank)
    assert tuple(f(args) for f in functions) == want
    args.moe_expert_model_parallelism = False
    assert (mpu.get_expert_parallel_world_size(args), mpu.get_expert_parallel_rank(args)) == (1, 0)
    assert tuple(f(args) for f in functions) == (1, 1, experts, features)


def test_shares_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpu.dist, "get_world_size", lambda group: 4)
    with pytest.raises(ConfigError, match=r"^moe_num_experts is 6: must be a multiple of 4"):
        mpu.experts_per_rank(arguments(6, 8))
    with pytest.raises(ConfigError, match=r"^moe_num_experts is 3: must divide 4"):
        mpu.features_per_rank(arguments(3, 8))
    with pytest.raises(ConfigError, match=r"^ffn_hidden_size is 9: must be a multiple of 2"):
        mpu.features_per_rank(arguments(2, 9))


def test_marks_of_parameters() -> None:
    plain, marked, copy = (torch.nn.Parameter(torch.ones(1)) for _ in range(3))
    mpu.set_expert_model_parallel_attributes(marked, False)
    assert (mpu.is_moe_param(plain), mpu.is_moe_param(marked)) == (False, True)
    assert not mpu.param_is_expert_model_parallel(marked)
    mpu.copy_expert_model_parallel_attributes(copy, plain)
    assert not mpu.is_moe_param(copy)
    mpu.set_expert_model_parallel_attributes(plain, True)
    mpu.copy_expert_model_parallel_attributes(copy, plain)
    assert mpu.param_is_expert_model_parallel(copy)
    assert copy.expert_model_parallel is True
    with pytest.raises(ConfigError, match=r"^tensor.expert_model_parallel is True: must not be set yet"):
        mpu.set_expert_model_parallel_attributes(plain, False)
