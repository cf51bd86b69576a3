"""Plain decoding: the whole window is read again for every token. No cache, one sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from dmoe.checkpoint import load_model_weights
from dmoe.config import RunConfig, require
from dmoe.data import Tokenizer, load_tokenizer
from dmoe.generate.sampling import sample_token
from dmoe.models import Decoder


def load_run(run_dir: Path, config: RunConfig, device: torch.device) -> tuple[Decoder, Tokenizer]:
    """Model and tokeniser of a run directory, from its newest whole checkpoint; with its adapters, if it has some."""
    tokenizer = load_tokenizer(run_dir / "tokenizer.json")
    if config.train.lora.rank:
        from dmoe.lora.load import load_adapted

        return load_adapted(run_dir, config, device)[0], tokenizer
    model = Decoder.on_meta(config.model).to_empty(device=device)
    load_model_weights(run_dir, model)
    return model.eval(), tokenizer


def generate_tokens(
    model: Decoder,
    prompt_ids: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
) -> Iterator[int]:
    """New token ids one by one, until `eos_id` (not yielded) or `max_new_tokens`.

    The model sees the last `max_seq_len` tokens. The same arguments give the same tokens on the same machine.

    Raises:
        ConfigError: an empty prompt, or a sampling argument out of range.
    """
    require(len(prompt_ids) > 0, "prompt", "", "at least one token")
    require(temperature >= 0, "temperature", temperature, "0 or greater")
    require(top_k >= 0, "top_k", top_k, "0 or greater")
    require(0 < top_p <= 1, "top_p", top_p, "in (0, 1]")
    require(0 <= seed < 2**63, "seed", seed, "in [0, 2**63)")
    generator = torch.Generator(model.embed_tokens.weight.device).manual_seed(seed)

    def choose(logits_V: Tensor) -> int:
        return sample_token(logits_V, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)

    return _decode(model, list(prompt_ids), max_new_tokens, choose, eos_id)


@torch.no_grad()
def _decode(
    model: Decoder, ids: list[int], max_new_tokens: int, choose: Callable[[Tensor], int], eos_id: int | None
) -> Iterator[int]:
    device = model.embed_tokens.weight.device
    for _ in range(max_new_tokens):
        window = torch.tensor([ids[-model.config.max_seq_len :]], device=device)
        token = choose(model(window)[0, -1])
        if token == eos_id:
            return
        ids.append(token)
        yield token
