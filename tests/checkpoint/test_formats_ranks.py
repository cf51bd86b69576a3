"""Ranks load their parts of a Hugging Face directory, and what they save in any layout is exported to the same bytes.

The ranks' side is in formats_ranks_worker.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

import dmoe
from dmoe.checkpoint.dcp_io import read_dcp_metadata
from dmoe.checkpoint.formats import convert, load_into, read_config
from dmoe.checkpoint.formats.hf import write_hf
from dmoe.checkpoint.formats.load import local_folder
from dmoe.config import ModelConfig, MoEConfig
from dmoe.errors import ConfigError
from dmoe.models import Decoder
from tests.checkpoint.formats_ranks_worker import RUNS, rank_main
from tests.checkpoint.formats_source import Weights

MIXTRAL = ModelConfig(
    vocab_size=48, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=24,
    qk_norm="none", max_seq_len=64, moe=MoEConfig(num_experts=6, intermediate_size=24, top_k=2),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and a run of each in each layout, written by two ranks."""
    root = tmp_path_factory.mktemp("ranks")
    for case, tied in (("mixtral", False), ("tied", True)):
        (root / case).mkdir()
        write_hf(Weights(replace(MIXTRAL, tie_embeddings=tied)), root / case)
    run_ranks(rank_main, (2, str(root)), 2)
    return root


@pytest.mark.parametrize(("case", "layout"), RUNS)
def test_what_ranks_saved_is_exported_without_them(folder: Path, tmp_path: Path, case: str, layout: str) -> None:
    run = folder / f"{case}-{layout}"
    metadata = read_dcp_metadata(run / "checkpoints" / "step-00000007")
    files = {info.relative_path for info in metadata.storage_data.values()}
    assert len(files) == 2, "one rank has written all"
    experts = metadata.state_dict_metadata["model.layers.0.mlp.experts.gate_up_proj"]
    assert list(experts.size) == [6, 2, 24, 32]
    assert len(experts.chunks) == (1 if layout == "pp2" else 2)
    convert(run, tmp_path / "hf", "hf")
    exported, original = (f / "model.safetensors" for f in (tmp_path / "hf", folder / case))
    assert exported.read_bytes() == original.read_bytes()
    assert read_config(tmp_path / "hf") == read_config(folder / case)


def test_load_into_keeps_dtype_and_ties(folder: Path) -> None:
    model = Decoder(read_config(folder / "tied")).double()
    load_into(model, folder / "tied")
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.lm_head.weight is model.embed_tokens.weight
    reference = dmoe.from_pretrained(folder / "tied").state_dict()
    assert all(torch.equal(t, reference[n].double()) for n, t in model.state_dict().items())
    with pytest.raises(ConfigError, match=r"lm_head.weight is only in the files"):
        load_into(model, folder / "mixtral")
    untied = Decoder(read_config(folder / "mixtral"))
    load_into(untied, folder / "tied")
    assert torch.equal(untied.lm_head.weight, reference["embed_tokens.weight"])


def test_names_that_are_no_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    for name in ("nowhere", "./a/b", "a/b/c", Path("a/b")):
        with pytest.raises(ConfigError, match=r"must be a directory, or NAME/MODEL .*; there is no such directory"):
            dmoe.from_pretrained(name)
    calls = []

    def offline(name: str, **options: Any) -> str:
        calls.append(name)
        raise hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(ConfigError, match=r"'org/model'.*the download failed .*no network.*offline, give"):
        dmoe.from_pretrained("org/model")
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **_: str(tmp_path))
    assert (calls, local_folder("org/model")) == (["org/model"], tmp_path)
    assert local_folder(tmp_path) == tmp_path
