"""Whether two directories hold the same model: their logits on real text, each computed by its own library."""

from __future__ import annotations

import importlib.util
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmoe.checkpoint.formats import hf
from dmoe.checkpoint.formats.dmoe_run import is_one as is_run
from dmoe.checkpoint.formats.extra_files import tokenizer_file
from dmoe.checkpoint.formats.load import fill
from dmoe.checkpoint.formats.mapped import listed
from dmoe.checkpoint.formats.names import has_expert_rows, tensor_shapes
from dmoe.checkpoint.formats.source import open_source
from dmoe.checkpoint.formats.store import Source
from dmoe.checkpoint.parts import model_tensors
from dmoe.errors import ConfigError, RunError

NUM_SEQUENCES = 4
SEQ_LEN = 64

MAX_DIFFERENCE = 1e-3
"""Bound on the largest difference of logits, over the largest logit, where no value was rounded. Two libraries add in
other orders, in fp32: 1e-6 to 1e-5."""
MAX_KL = 0.02
"""Bound on the mean divergence, in nats a token, where values were rounded to another dtype."""


@dataclass(frozen=True)
class Comparison:
    """Of two models' logits over the same tokens, in fp32."""

    libraries: tuple[str, str]
    """What computed source and result: "transformers" or "dmoe"."""
    num_tokens: int
    max_difference: float
    max_logit: float
    """Largest of the source, by absolute value."""
    kl: float
    """Mean over tokens of KL(source || result), in nats."""
    top1: float
    """Share of tokens with the same most likely next one."""
    unequal: tuple[str, ...]
    """Our names of tensors that are not equal bit for bit, where no value was rounded."""
    rounded: bool
    """Whether values were rounded to another dtype, which decides on the bound."""

    @property
    def ok(self) -> bool:
        if self.rounded:
            return self.kl <= MAX_KL
        return not self.unequal and self.max_difference <= MAX_DIFFERENCE * max(self.max_logit, 1e-30)

    def __str__(self) -> str:
        if self.unequal:
            return f"NOT the same model: {len(self.unequal)} tensors differ: {listed(self.unequal)}"
        bound = f"KL at most {MAX_KL}" if self.rounded else f"a difference of at most {MAX_DIFFERENCE} of that"
        return (
            f"{'same' if self.ok else 'NOT the same'} model, by {self.libraries[0]} and {self.libraries[1]} in fp32 "
            f"over {self.num_tokens} tokens: logits differ by at most {self.max_difference:.2e} (largest logit "
            f"{self.max_logit:.3g}), KL {self.kl:.2e} nats, same most likely token {self.top1:.1%}; asked: {bound}"
        )


def verify(
    src: Path | str,
    dst: Path | str,
    *,
    text: Path | str | None = None,
    rounded: bool = False,
    source_kind: str | None = None,
    source_hints: dict[str, Any] | None = None,
) -> Comparison:
    """Compare two models of any format: bit by bit, and by their logits on `NUM_SEQUENCES` x `SEQ_LEN` tokens of text.

    A Hugging Face directory is computed by transformers where that is installed, and everything else by our `Decoder`.
    One model is in memory at a time, in fp32. Tokens come from the tokenizer.json of either; without one the bytes of
    the text stand for themselves.

    Args:
        text: a file. None: the Python standard library's source.
        rounded: whether the result has another dtype.
    """
    src, dst = Path(src), Path(dst)
    source = open_source(src, source_kind, **(source_hints or {}))
    ids_BS = sample(src, dst, source.config.vocab_size, source.config.max_seq_len, text)
    library, logits_BSV = _logits(src, ids_BS, source)
    result = open_source(dst)
    other, others_BSV = _logits(dst, ids_BS, result)
    unequal = () if rounded else unequal_tensors(source, result)
    return compare((library, other), logits_BSV, others_BSV, rounded, unequal)


def unequal_tensors(source: Source, result: Source) -> tuple[str, ...]:
    """Names of our tensors that are in one alone or differ in a bit. One row of experts at a time is in memory."""
    names = set(source.names()) & set(result.names())
    shapes = tensor_shapes(source.config)

    def equal(name: str) -> bool:
        rows = range(shapes[name][0]) if has_expert_rows(name) else (None,)
        return all(_same_bits(source.read(name, row), result.read(name, row)) for row in rows)

    return tuple(sorted(set(source.names()) ^ set(result.names()))) + tuple(n for n in sorted(names) if not equal(n))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def compare(
    libraries: tuple[str, str],
    logits_BSV: Tensor,
    others_BSV: Tensor,
    rounded: bool = False,
    unequal: tuple[str, ...] = (),
) -> Comparison:
    """The figures of two sets of logits [B, S, V]."""
    if logits_BSV.shape != others_BSV.shape:
        raise RunError(f"the result has logits {list(others_BSV.shape)}: must be {list(logits_BSV.shape)}")
    difference, largest = (logits_BSV - others_BSV).abs().max().item(), logits_BSV.abs().max().item()
    p, q = logits_BSV.double().log_softmax(-1), others_BSV.double().log_softmax(-1)
    return Comparison(
        libraries=libraries,
        num_tokens=logits_BSV.shape[0] * logits_BSV.shape[1],
        max_difference=difference,
        max_logit=largest,
        kl=(p.exp() * (p - q)).sum(-1).mean().item(),
        top1=(logits_BSV.argmax(-1) == others_BSV.argmax(-1)).double().mean().item(),
        unequal=unequal,
        rounded=rounded,
    )


def sample(src: Path, dst: Path, vocab_size: int, max_seq_len: int, text: Path | str | None) -> Tensor:
    """Token ids [B, S] of real text. Raises ConfigError for a text that cannot be read or is too short."""
    try:
        content = (Path(sysconfig.get_path("stdlib")) / "argparse.py" if text is None else Path(text)).read_bytes()
    except OSError as error:
        raise ConfigError(f"--text is {str(text)!r}: must be a file ({error.strerror})") from None
    seq_len = min(SEQ_LEN, max_seq_len)
    needed = NUM_SEQUENCES * seq_len
    ids = _encode(src, dst, content[: 16 * needed].decode(errors="ignore"), vocab_size)
    if len(ids) < needed:
        raise ConfigError(f"--text is {str(text)!r}: must have at least {needed} tokens, not {len(ids)}")
    return torch.tensor(ids[:needed]).reshape(NUM_SEQUENCES, seq_len)


def _encode(src: Path, dst: Path, text: str, vocab_size: int) -> list[int]:
    from dmoe.data.tokenizer import load_tokenizer

    for path in (src, dst):
        file = tokenizer_file(path)
        if file is None:
            continue
        try:
            ids = load_tokenizer(file).encode(text)
        except ConfigError:
            continue
        if max(ids, default=0) < vocab_size:
            return ids
    return [byte % vocab_size for byte in text.encode()]


@torch.no_grad()
def _logits(path: Path, ids_BS: Tensor, source: Source) -> tuple[str, Tensor]:
    """(library, logits in fp32 [B, S, V])."""
    if hf.is_one(path) and not is_run(path) and importlib.util.find_spec("transformers"):
        return "transformers", _logits_of_transformers(path, ids_BS)
    from dmoe.models import Decoder

    model = Decoder.on_meta(source.config).to_empty(device="cpu")
    fill(model_tensors([model]), source)
    model.eval()
    return "dmoe", torch.cat([model(row_S[None]) for row_S in ids_BS])


def _logits_of_transformers(path: Path, ids_BS: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"{path}: transformers cannot load it: {type(error).__name__}: {reason}") from error
    model, report = loaded
    for what in ("missing_keys", "mismatched_keys"):
        if report.get(what):
            raise RunError(f"{path}: transformers reports {what}: {sorted(map(str, report[what]))[:5]}")
    model.eval()
    return torch.cat([model(row_S[None]).logits.float() for row_S in ids_BS])
