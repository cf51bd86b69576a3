"""Experts of transformers 5 computed by us: whole models against "eager", single modules against a formula."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))
import transformers_experts_cases as cases
import transformers_models as models

from dmoe.errors import ConfigError
from dmoe.integrations import transformers as integration
from dmoe.integrations import transformers_experts
from dmoe.integrations.transformers import calls, check, register, use

FAMILIES = ["mixtral", "olmoe", "qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss", "jamba", "granitemoe"]


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in another layout are rearranged for the fused path however few rows there are."""
    monkeypatch.setattr(transformers_experts, "ROWS_WORTH_A_COPY", 0)


def both(model: Any, **inputs: Any) -> tuple[Any, Any]:
    """(logits, gradients) of "eager" and of ours."""
    model.set_experts_implementation("eager")
    want = models.run(model, models.batch(**inputs))
    use(model)
    return want, models.run(model, models.batch(**inputs))


def assert_equal(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]], limit: float) -> None:
    assert models.error(got[0], want[0]) <= limit
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        assert models.error(got[1][name], gradient) <= limit, name


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients(family: str) -> None:
    model = models.build(family)
    want, got = both(model, padded=True)
    assert_equal(got, want, 5e-6)
    experts = [n for n, m in model.named_modules() if type(m).__name__.endswith("Experts")]
    assert experts
    assert calls(model) == dict.fromkeys(experts, 1)


def test_gpt_oss_fused(copying: None) -> None:
    want, got = both(models.build("gpt_oss"))
    assert_equal(got, want, 5e-6)


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_every_expert_chosen(family: str) -> None:
    want, got = both(models.build(family, num_experts_per_tok=6), padded=True)
    assert_equal(got, want, 5e-6)


def run_module(module: Any, function: Any, x: Tensor, ids: Tensor, weights: Tensor) -> list[Tensor]:
    """Output and all gradients."""
    x, weights = (t.detach().clone().requires_grad_() for t in (x, weights))
    module.zero_grad()
    y = function(x, ids, weights)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).cos().view(y.shape))
    return [y.detach(), x.grad, weights.grad, *(p.grad.clone() for p in module.parameters())]  # type: ignore[list-item]


def compare(case: cases.Case, x: Tensor, ids: Tensor, weights: Tensor, limit: float = 2e-6) -> None:
    module = cases.build(case)
    got = run_module(module, module, x, ids, weights)
    exact = copy.deepcopy(module).double()
    want = run_module(exact, lambda *args: cases.expected(exact, case, *args), x.double(), ids, weights.double())
    for a, b in zip(got, want, strict=True):
        assert models.error(a, b) <= limit if b.numel() else a.shape == b.shape


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("copies", [False, True], ids=["as stored", "rearranged"])
def test_flags(name: str, copies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if copies:
        monkeypatch.setattr(transformers_experts, "ROWS_WORTH_A_COPY", 0)
    case = cases.CASES[name]
    ids, weights = cases.routing(13, min(2, case.num_experts), case.num_experts)
    compare(case, torch.randn(13, cases.D), ids, weights)


@pytest.mark.parametrize("name", ["plain layout", "own gate, transposed, interleaved, bias"])
@pytest.mark.parametrize(("tokens", "top_k", "used"), [(1, 2, 5), (9, 5, 5), (9, 2, 3), (4, 1, 1)])
def test_sizes(name: str, tokens: int, top_k: int, used: int) -> None:
    """One token, k = E, experts without tokens, all tokens on one expert."""
    compare(cases.CASES[name], torch.randn(tokens, cases.D), *cases.routing(tokens, top_k, 5, used))


@pytest.mark.parametrize("name", ["plain layout", "gpt-oss", "own gate"])
def test_no_token(name: str) -> None:
    module = cases.build(cases.CASES[name])
    got = run_module(module, module, torch.randn(0, cases.D), *cases.routing(0, 2, 5))
    assert got[0].shape == (0, cases.D)
    assert all((g == 0).all() for g in got[1:])


@pytest.mark.parametrize("name", cases.CASES)
def test_which_path(name: str) -> None:
    """Fused if one of our activations is the module's, and the weights go to the product as they lie."""
    form = transformers_experts.find_form(cases.build(cases.CASES[name]))
    assert (form is not None) == (name in cases.OURS)
    if form is not None:
        assert form == (cases.CASES[name].gate, cases.CASES[name].interleaved)


def test_weights_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = transformers_experts.expert_mlp

    def expert_mlp(*args: Any, **options: Any) -> Tensor:
        seen.extend(t.data_ptr() for t in args[3:5])
        return real(*args, **options)

    monkeypatch.setattr(transformers_experts, "expert_mlp", expert_mlp)
    module = cases.build(cases.Case())
    module(torch.randn(3, cases.D), *cases.routing(3, 2, 5))
    assert seen == [module.gate_up_proj.data_ptr(), module.down_proj.data_ptr()]


def test_few_rows_do_not_move_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    fused: list[int] = []
    real = transformers_experts.expert_mlp
    monkeypatch.setattr(transformers_experts, "expert_mlp", lambda *a, **o: fused.append(len(a[0])) or real(*a, **o))
    module = cases.build(cases.CASES["gpt-oss"])
    limit = transformers_experts.ROWS_WORTH_A_COPY * 5
    for tokens in (limit - 1, limit):
        module(torch.randn(tokens, cases.D), *cases.routing(tokens, 1, 5))
    assert fused == [limit]


@pytest.mark.parametrize("name", [n for n, c in cases.CASES.items() if c.num_experts > 1])
def test_sentinels(name: str, copying: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids that no expert of this rank has, whatever the token and the weight are."""
    real = transformers_experts.expert_mlp

    def expert_mlp(x: Tensor, ids: Tensor, *args: Any, **options: Any) -> Tensor:
        assert ids.max() == 5  # all that it promises to skip
        return real(x, ids, *args, **options)

    monkeypatch.setattr(transformers_experts, "expert_mlp", expert_mlp)
    case = cases.CASES[name]
    module = cases.build(case)
    module._is_expert_parallel = True
    ids, weights = cases.routing(9, 2, 5)
    ids[::2, 1], ids[4] = 5, 5
    ids[6, 1] = 7  # beyond E, as an id of another rank
    x = torch.randn(9, cases.D)
    got_x, got_weights = x.clone(), weights.clone()
    got_x[4], got_weights[4], got_weights[0, 1] = float("nan"), float("inf"), float("nan")
    got = run_module(module, module, got_x, ids, got_weights)
    exact = copy.deepcopy(module).double()
    want = run_module(exact, lambda *args: cases.expected(exact, case, *args), x.double(), ids, weights.double())
    for a, b in zip(got, want, strict=True):
        assert models.error(a, b) <= 2e-6


@pytest.mark.parametrize("name", ["plain layout", "gpt-oss", "own gate", "norm, bias", "no gate"])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_bf16_within_rounding(name: str, weight_dtype: torch.dtype) -> None:
    """Not further from float64 than the formula in bf16 is, up to a quarter."""
    case = cases.CASES[name]
    module = cases.build(case, torch.bfloat16)
    ids, weights = cases.routing(40, 2, 5)
    x, weights = torch.randn(40, cases.D).bfloat16(), weights.to(weight_dtype)
    exact = copy.deepcopy(module).double()
    want = run_module(exact, lambda *args: cases.expected(exact, case, *args), x.double(), ids, weights.double())
    plain = run_module(module, lambda *args: cases.expected(module, case, *args).bfloat16(), x, ids, weights)
    got = run_module(module, module, x, ids, weights)
    assert [t.dtype for t in got] == [t.dtype for t in plain]
    for a, b, c in zip(got, plain, want, strict=True):
        assert (a.double() - c).norm() <= 1.25 * (b.double() - c).norm() + 0.002 * c.norm()


def test_bf16_model() -> None:
    model = models.build("mixtral", torch.bfloat16)
    want, got = both(model)
    assert (got[0].float() - want[0].float()).norm() < 0.05 * want[0].float().norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("name", ["plain layout", "own gate, transposed, interleaved, bias"])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    case = cases.CASES[name]
    module = cases.build(case, dtype)
    ids, weights = cases.routing(9, 2, 5)
    x = torch.randn(9, cases.D, dtype=dtype)
    exact = copy.deepcopy(module).double()
    want = run_module(exact, lambda *args: cases.expected(exact, case, *args), x.double(), ids, weights.double())
    got = run_module(module, module, x, ids, weights.to(dtype))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert models.error(a, b) <= (1e-12 if dtype == torch.float64 else 5e-3)


@pytest.mark.parametrize("name", ["plain layout", "gpt-oss", "own gate", "norm, bias"])
def test_autocast(name: str) -> None:
    """Products in bf16 as those of the formula, the result in the dtype of the input."""
    case = cases.CASES[name]
    module = cases.build(case)
    x = torch.randn(11, cases.D)
    ids, weights = cases.routing(11, 2, 5)
    exact = run_module(module, lambda *args: cases.expected(module, case, *args), x, ids, weights)
    with torch.autocast("cpu", torch.bfloat16):
        got = run_module(module, module, x, ids, weights)
    for a, b in zip(got, exact, strict=True):
        assert a.dtype == torch.float32
        assert 1e-5 < (a - b).norm() / b.norm() < 0.03


def test_compiled_in_one_graph() -> None:
    """Without an eager call before, so that the compiler meets the look at the activation too."""
    case = cases.CASES["norm, bias"]
    module = cases.build(case)
    inputs = torch.randn(11, cases.D), *cases.routing(11, 2, 5)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    got = run_module(module, compiled, *inputs)
    assert module.__dict__.get("_dmoe_calls", 0) == 0
    for a, b in zip(got, run_module(module, module, *inputs), strict=True):
        assert models.error(a, b) <= 1e-6


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_checkpointed_model(family: str) -> None:
    model = models.build(family)
    want, plain = both(model)
    assert_equal(plain, want, 5e-6)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal(models.run(model, models.batch()), want, 5e-6)
    assert set(calls(model).values()) == {3}  # recomputed ones count


def test_compiled_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.build("olmoe", num_hidden_layers=3)
    model.set_experts_implementation("eager")
    want = models.run(model, models.batch())
    use(model)
    monkeypatch.setattr(integration, "_was_traced", [False])
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):  # one code for all layers
        assert_equal(models.run(model, models.batch()), want, 5e-6)


@pytest.mark.parametrize("frozen", ["gate_up_proj", "down_proj", "experts"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_frozen_weights(family: str, frozen: str) -> None:
    model = models.build(family)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    want, got = both(model)
    assert not any(frozen in name for name in got[1])
    assert_equal(got, want, 5e-6)


def test_activations_by_name() -> None:
    from transformers.activations import ACT2FN

    wanted = {
        "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh", "gelu_accurate": "gelu_tanh", "gelu_fast": "gelu_tanh",
        "gelu_python_tanh": "gelu_tanh", "relu": "relu", "relu2": "relu2",
    }  # fmt: skip
    for has_gate in (True, False):
        found = {}
        for name in ACT2FN:
            if name == "xielu":  # prints
                continue
            module = cases.build(cases.Case(has_gate=has_gate))
            module.__dict__["act_fn"] = ACT2FN[name]
            form = transformers_experts.find_form(module)
            if form is not None:
                found[name] = form.activation
        assert found == wanted


@pytest.mark.parametrize(("limit", "alpha"), [(7.0, 1.0), (10.0, 1.702), (99.0, 1.702)])
def test_another_clamp_is_not_ours(limit: float, alpha: float) -> None:
    module = models.build("gpt_oss").model.layers[0].mlp.experts
    assert transformers_experts.find_form(module) == ("clamped_swiglu", True)
    module.limit, module.alpha = limit, alpha
    assert transformers_experts.find_form(module) is None


def test_a_late_clamp_is_not_ours() -> None:
    module = cases.build(cases.Case())
    type(module)._apply_gate = lambda _self, h: cases.gated("silu", h.chunk(2, -1)[0].clamp(max=60), h.chunk(2, -1)[1])
    assert transformers_experts.find_form(module) is None


def test_a_learned_activation_is_not_ours() -> None:
    module = cases.build(cases.Case())
    module.__dict__["act_fn"] = nn.PReLU(init=0.0, dtype=torch.float64)  # a ReLU for now
    assert transformers_experts.find_form(module) is None


def test_from_pretrained(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = models.build("mixtral")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="dmoe").train()
    check(loaded)
    model.set_experts_implementation("eager")
    assert_equal(models.run(loaded, models.batch()), models.run(model, models.batch()), 5e-6)
    assert set(calls(loaded).values()) == {1}
    assert set(calls(model).values()) == {0}
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_register_again() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    before = list(ALL_EXPERTS_FUNCTIONS)
    register()
    assert list(ALL_EXPERTS_FUNCTIONS) == before


@pytest.mark.parametrize("family", ["llama4_text", "dbrx", "jetmoe"])
def test_models_that_would_not_follow_are_refused(family: str) -> None:
    model = models.build(family)
    kind = type(model).__name__
    before = model.config._experts_implementation
    with pytest.raises(ConfigError, match=rf'{kind} has .*Expert.*must be "eager"'):
        use(model)
    assert model.config._experts_implementation == before
    model.config._experts_implementation = "dmoe"  # as from_pretrained sets it
    with pytest.raises(ConfigError, match=kind):
        check(model)


def test_other_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="model is a Linear: must be a transformers"):
        use(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="Linear has no experts module"):
        check(nn.Linear(2, 2))
    model = models.build("olmoe")
    model.set_experts_implementation("eager")
    with pytest.raises(ConfigError, match=r"OlmoeForCausalLM.model.layers.0.mlp.experts is 'eager': must be 'dmoe'"):
        check(model)
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    with pytest.raises(ConfigError, match="pip install 'transformers"):
        register()


def test_a_forward_that_does_not_reach_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "_was_traced", [False])  # other tests compile
    model = use(models.build("olmoe"))
    for layer in model.model.layers:  # as another kernel for the whole block does
        layer.mlp.forward = lambda hidden_states: hidden_states
    with pytest.raises(ConfigError, match="forward of OlmoeForCausalLM did not reach it"):
        model(**models.batch())
    model(**models.batch())  # said once
    model = pickle.loads(pickle.dumps(use(models.build("olmoe"))))
    model(**models.batch())
    check(copy.deepcopy(model))


def test_quantised_experts_are_refused() -> None:
    model = models.build("olmoe")
    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts.down_proj = nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ConfigError, match=r"OlmoeForCausalLM has model.layers.0.mlp.experts \(OlmoeExperts\)"):
        use(model)


def test_generate() -> None:
    model = models.build("mixtral").eval()
    model.set_experts_implementation("eager")
    inputs = models.batch()
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    want = model.generate(**inputs, **options)
    use(model)
    assert torch.equal(model.generate(**inputs, **options), want)
    assert min(calls(model).values()) >= 5
