"""Families against transformers: config.json, names and bytes of tensors, logits, gradients, greedy tokens."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_cases import (
    CASES,
    ONE_EACH,
    check_mapping,
    family_and_config,
    ours,
    padded,
    read_into,
    saved,
    texts,
    theirs,
    written,
)
from torch import Tensor

from dmoe.checkpoint.formats import convert
from dmoe.checkpoint.formats.mapping import Part, Stored
from dmoe.config import ModelConfig
from dmoe.config.attention import RopeConfig
from dmoe.generate import generate_tokens
from dmoe.models import Decoder

transformers = pytest.importorskip("transformers")


# What transformers does not compute with, says twice in different words, or takes from a default.
_FREE = {
    "dtype", "head_dim", "transformers_version", "num_nextn_predict_layers", "num_mtp_layers", "aux_loss_alpha",
    "seq_aux", "scoring_func", "moe_layer_freq", "max_window_layers", "decoder_sparse_step", "mlp_only_layers",
    "interleave_moe_layer_step", "no_rope_layer_interval", "rope_parameters",
}  # fmt: skip
_FREE_OF = {
    "deepseek_v2": {"n_group", "topk_group"},  # greedy
    "deepseek_v3": {"topk_method"},
    "llama4-two-experts": {"floor_scale", "attn_scale"},  # not tuned
}
_ROPE_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "factor": 1.28}


@pytest.mark.parametrize("case", CASES)
def test_config_json_through_ours_and_back_means_the_same_to_transformers(case: str) -> None:
    family, config = family_and_config(case)
    back = family.from_config(config)
    assert family.to_config(back) == config
    before, after = (
        transformers.CONFIG_MAPPING[CASES[case][0]](**hf).to_dict() for hf in (saved(case).config_json, back)
    )
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    changed -= _FREE | _FREE_OF.get(case.removesuffix("-one-group"), set())
    assert {key: (before.get(key), after.get(key)) for key in changed} == {}
    defaults = {key: _ROPE_DEFAULTS[key] for key in after["rope_parameters"].keys() - before["rope_parameters"].keys()}
    assert after["rope_parameters"] == before["rope_parameters"] | defaults


@pytest.mark.parametrize("case", ["deepseek_v3", "gpt_oss", "llama4", "qwen3_moe", "phimoe", "granitemoe"])
def test_transformers_loads_what_we_write(case: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    family, config = family_and_config(case)
    (tmp_path / "config.json").write_text(json.dumps(family.from_config(config)))
    tensors = {name: t.contiguous() for name, t in written(ours(case).state_dict(), family.mapping(config)).items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    ids, mask = padded("left")
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], ours(case)(ids, mask)[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fused", [False, True], ids=["on-disk", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_tensors_of_transformers_through_ours_and_back_are_the_same(case: str, fused: bool) -> None:
    family, config = family_and_config(case)
    stored, mapping = saved(case, fused).tensors, family.mapping(config, fused)
    assert {s.name: s.shape for s in mapping} == {name: tuple(t.shape) for name, t in stored.items()}
    state = Decoder(config).state_dict()
    for tensor in state.values():
        tensor.fill_(torch.nan)
    read_into(state, mapping, stored)
    back = written(state, mapping)
    for name, tensor in stored.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor), name
    assert not any(tensor.isnan().any() for tensor in state.values())


@pytest.mark.parametrize("fused", [False, True], ids=["on-disk", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_every_element_is_mapped_once(case: str, fused: bool) -> None:
    family, config = family_and_config(case)
    check_mapping(family.mapping(config, fused), config)


@pytest.mark.parametrize("case", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_large_tensors_are_mapped_an_expert_at_a_time(case: str) -> None:
    family, config = family_and_config(case)
    for fused in (False, True):
        for stored in family.mapping(config, fused):
            for part in stored.parts:
                assert (part.index is not None) == part.ours.endswith(("experts.gate_up_proj", "experts.down_proj"))


def test_a_mapping_that_is_wrong_is_noticed() -> None:
    family, config = family_and_config("granitemoeshared")
    mapping = family.mapping(config)
    index = next(i for i, stored in enumerate(mapping) if "shared_mlp.input" in stored.name)
    stored = mapping[index]
    gate, up = stored.parts

    def with_parts(*parts: Part) -> list[Stored]:
        return [*mapping[:index], replace(stored, parts=parts), *mapping[index + 1 :]]

    for parts in ((gate,), (gate, up, up), (replace(gate, place=up.place), up), (gate, replace(up, ours=gate.ours))):
        with pytest.raises(AssertionError):
            check_mapping(with_parts(*parts), config)


def _theirs(case: str, ids: Tensor, mask: Tensor) -> Tensor:
    return theirs(case)(input_ids=ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, side: str) -> None:
    ids, mask = padded(side)
    with torch.no_grad():
        expected, logits = _theirs(case, ids, mask), ours(case)(ids, mask)
    assert expected[mask.bool()].std() > 0.1
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_every_parameter(case: str) -> None:
    ids, mask = padded("right")
    weights = torch.randn(256, generator=torch.Generator().manual_seed(0))
    family, config = family_and_config(case)
    model, other = ours(case), theirs(case)
    for m, logits in ((model, model(ids, mask)), (other, _theirs(case, ids, mask))):
        m.zero_grad()
        ((logits.log_softmax(-1) @ weights) * mask).sum().div(mask.sum()).backward()
    tied = config.tie_embeddings
    grads = {name: p.grad for name, p in other.named_parameters() if not (tied and "lm_head" in name)}
    # In memory they have the names of the fused form. The bias of the choice is a buffer.
    mapping = [stored for stored in family.mapping(config, True) if "correction_bias" not in stored.name]
    assert {stored.name for stored in mapping} == set(grads)
    expected = {name: torch.full_like(p, torch.nan) for name, p in model.named_parameters()}
    read_into(expected, mapping, grads)
    assert len(expected) >= 12
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(
            parameter.grad, expected[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    model.zero_grad()


def _about(name: str) -> Callable[[str], str]:
    return lambda message: f"{name}: {message}"


@pytest.mark.parametrize("case", ONE_EACH)
def test_greedy_tokens(case: str) -> None:
    prompt = torch.tensor([list(texts()[1])[:8]])
    expected = theirs(case).generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False, pad_token_id=0
    )
    tokens = list(generate_tokens(ours(case), prompt[0].tolist(), 64))
    assert tokens == expected[0, 8:].tolist()
    assert len(set(tokens)) > 3


def test_models_of_a_family_differ_where_their_configs_do() -> None:
    # The windows, chunks and scalings above are no decoration: without them the logits are others.
    ids, mask = padded("right")
    for case in ("mistral", "llama4", "gpt_oss", "llama"):
        config = family_and_config(case)[1]
        plain = Decoder(_without_variants(config)).eval()
        state = ours(case).state_dict()
        plain.load_state_dict(state)
        with torch.no_grad():
            assert not torch.allclose(plain(ids, mask), ours(case)(ids, mask), atol=1e-2), case


def _without_variants(config: ModelConfig) -> ModelConfig:
    rope = RopeConfig(interleaved=config.rope.interleaved)
    return replace(config, attention_window=0, layer_attention=(), rope=rope)


@pytest.mark.parametrize("fused", [False, True], ids=["on-disk", "fused"])
@pytest.mark.parametrize("case", ONE_EACH)
def test_files_through_a_run_directory_and_back_are_the_same(case: str, fused: bool, tmp_path: Path) -> None:
    source, run, back = tmp_path / "source", tmp_path / "run", tmp_path / "back"
    theirs(case).save_pretrained(source, save_original_format=not fused)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tokenizer")
        convert(source, run, "dmoe")
        convert(run, back, "hf", fused=fused)
    assert (back / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, back))
    assert before == after
