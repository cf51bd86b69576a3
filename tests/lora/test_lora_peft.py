"""PEFT reads what we export: a transformers model with the adapters gives the logits of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_oracle import CONFIG, base_model, lora_train, randomize_B

from dmoe.errors import ConfigError
from dmoe.lora import add_adapters
from dmoe.lora.base import base_config, base_tokenizer, fingerprint, load_base
from dmoe.lora.peft import export_peft
from dmoe.models import Decoder

transformers = pytest.importorskip("transformers")

TINY: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3Moe": ("Qwen3Moe", {"moe_intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 2, "head_dim": 8,
                              "intermediate_size": 40, "mlp_only_layers": [0], "norm_topk_prob": True}),
    "Mixtral": ("Mixtral", {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2,
                            "sliding_window": None}),
}  # fmt: skip


def their_model(name: str) -> Any:
    kind, fields = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**TINY, **fields)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("mlp.gate.weight"):
            torch.nn.init.normal_(parameter)  # so that the choice of experts is clear
    return model


@pytest.mark.parametrize("name", MODELS)
def test_peft_reads_our_adapters(name: str, tmp_path: Path) -> None:
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path / "base")
    assert base_tokenizer(tmp_path / "base") is None
    before = fingerprint(tmp_path / "base")
    config = base_config(tmp_path / "base")
    model = Decoder.on_meta(config).to_empty(device="cpu").eval()
    load_base([model], tmp_path / "base")
    ids = torch.randint(0, 67, (2, 24))
    torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-5)

    train = lora_train(("attention", "experts", "router"))
    add_adapters(model, train.lora)
    randomize_B(model)
    export_peft(model, config, train.lora, tmp_path / "adapter", base=str(tmp_path / "base"))
    wanted = model(ids)
    assert not torch.allclose(wanted, theirs(ids).logits, atol=1e-2)
    peft = pytest.importorskip("peft", minversion="0.17")
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    torch.testing.assert_close(adapted(ids).logits, wanted, rtol=1e-3, atol=1e-4)

    file = next((tmp_path / "base").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert fingerprint(tmp_path / "base") != before


def test_what_peft_cannot_name_is_refused(tmp_path: Path) -> None:
    model = base_model()
    add_adapters(model, lora_train(("mlp",)).lora)
    with pytest.raises(ConfigError, match=r"train.lora.targets is .*'mlp'.*must be without adapters outside of"):
        export_peft(model, CONFIG, lora_train(("mlp",)).lora, tmp_path / "adapter")
