"""Plain decoding: the whole window is read again for every token. No cache, one sequence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from dmoe.checkpoint import load_model_weights
from dmoe.config import RunConfig, require
from dmoe.data import Tokenizer, load_tokenizer
from dmoe.generate.sampling import sample_token
from dmoe.models import Decoder


def load_run(run_dir: Path, config: RunConfig, device: torch.device) -> tuple[Decoder, Tokenizer]:
    """Model and tokeniser of a run directory, from its newest whole checkpoint."""
    model = Decoder.on_meta(config.model).to_empty(device=device)
    load_model_weights(run_dir, model)
    return model.eval(), load_tokenizer(run_dir / "tokenizer.json")


@torch.no_grad()
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
    """Yield new token ids until `eos_id` (not yielded) or `max_new_tokens`.

    The model sees the last `max_seq_len` tokens. The same arguments give the same tokens on the same machine.

    Raises:
        ConfigError: an empty prompt, or a sampling argument out of range.
    """
    require(len(prompt_ids) > 0, "prompt", "", "at least one token")
    require(temperature >= 0, "temperature", temperature, "0 or greater")
    require(top_k >= 0, "top_k", top_k, "0 or greater")
    require(0 < top_p <= 1, "top_p", top_p, "in (0, 1]")
    device = model.embed_tokens.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    ids = list(prompt_ids)
    for _ in range(max_new_tokens):
        window = torch.tensor([ids[-model.config.max_seq_len :]], device=device)
        logits_V = model(window)[0, -1]
        token = sample_token(logits_V, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        if token == eos_id:
            return
        ids.append(token)
        yield token
