"""What a conversion reads: every element, one expert at a time, of the newest whole checkpoint; and `verify`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from dmoe.checkpoint import find_checkpoints
from dmoe.checkpoint.formats import SafetensorsStore, convert, kind_of, open_source, read_config
from dmoe.checkpoint.formats.mapped import write_mapped
from dmoe.checkpoint.formats.names import has_expert_rows, tensor_shapes
from dmoe.checkpoint.formats.verify import compare, verify
from dmoe.errors import ConfigError, RunError
from tests.checkpoint.convert_cases import equal, rewritten, save_originals, tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*has no tokenizer.json")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what save_pretrained writes: matrices an expert; fused ones, interleaved, with biases."""
    return save_originals(tmp_path_factory.mktemp("originals"), ["mixtral", "gpt_oss"])


@pytest.fixture
def mixtral(originals: Path, tmp_path: Path) -> Path:
    """A copy of it that may be changed."""
    return Path(shutil.copytree(originals / "mixtral", tmp_path / "mixtral"))


@pytest.mark.parametrize("case", ["mixtral", "gpt_oss"])
def test_experts_are_read_and_written_one_at_a_time(
    originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    read, sizes = SafetensorsStore.read, []

    def counted(self: SafetensorsStore, name: str, index: int | None = None) -> torch.Tensor:
        tensor = read(self, name, index)
        sizes.append((name, tensor.numel()))
        return tensor

    convert(originals / case, tmp_path / "fused", "hf", fused=True)
    monkeypatch.setattr(SafetensorsStore, "read", counted)
    config = read_config(originals / case)
    row = max(torch.Size(s[1:]).numel() for n, s in tensor_shapes(config).items() if has_expert_rows(n))
    for to in ("dmoe", "hf"):
        sizes.clear()
        convert(tmp_path / "fused", tmp_path / to, to)
        experts = [numel for name, numel in sizes if ".experts." in name]
        assert len(experts) >= config.num_layers * config.moe.num_experts
        assert max(experts) <= row
        names = [name for name, _ in sizes if ".experts." not in name]
        assert len(names) == len(set(names)), "read twice"


def test_a_run_source_takes_the_newest_whole_checkpoint(mixtral: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    convert(mixtral, run, "dmoe")
    old = find_checkpoints(run)[0]
    new = Path(shutil.copytree(old, old.with_name("step-00000005")))
    for folder, step in ((new, 5),):
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | {"step": step}))
    source = open_source(run)
    assert (kind_of(run), kind_of(new), source.folder) == ("dmoe", "dmoe", new)  # type: ignore[attr-defined]
    assert open_source(old).folder == old  # type: ignore[attr-defined]
    (file,) = new.glob("*.distcp")
    altered = bytearray(file.read_bytes())
    altered[len(altered) // 2] ^= 1
    file.write_bytes(altered)
    with pytest.warns(UserWarning, match=r"step-00000005 is refused: .* is altered"):
        assert open_source(run).folder == old  # type: ignore[attr-defined]
    with pytest.raises(RunError, match="is altered"):
        open_source(new)
    shutil.rmtree(old)
    with (
        pytest.raises(RunError, match=r"all 1 checkpoints in .* are damaged"),
        pytest.warns(UserWarning, match="is refused"),
    ):
        open_source(run)
    shutil.rmtree(new)
    with pytest.raises(ConfigError, match="must have a checkpoint in"):
        open_source(run)


def test_a_run_whose_configuration_is_of_another_model_is_refused(mixtral: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    convert(mixtral, run, "dmoe")
    yaml = (run / "config.yaml").read_text()
    for before, after, message in (
        ("num_layers: 2", "num_layers: 3", r"tensors of the model are missing: .*layers\.2\."),
        ("num_layers: 2", "num_layers: 1", r"tensors are not of the model: .*layers\.1\."),
        ("num_experts: 6", "num_experts: 5", r"mlp\.experts\.\w+ is stored as \[6, .*must be \[5, |is stored as"),
    ):
        (run / "config.yaml").write_text(yaml.replace(before, after))
        with pytest.raises(RunError, match=message):
            open_source(run)
    (run / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"must be in a run, whose config.yaml"):
        open_source(run / "checkpoints" / "step-00000000")


def test_a_mapping_that_misses_something_is_a_bug_and_is_found(originals: Path) -> None:
    from dmoe.checkpoint.formats import families
    from dmoe.checkpoint.formats.mapped import MappedSource

    store, config = SafetensorsStore(originals / "mixtral"), read_config(originals / "mixtral")
    mapping = families.mixtral.mapping(config)
    index = next(i for i, stored in enumerate(mapping) if stored.name.endswith("experts.3.w1.weight"))
    half = replace(
        mapping[index], parts=(replace(mapping[index].parts[0], view=lambda t: t[:5], place=lambda t: t[:5]),)
    )
    with pytest.raises(ValueError, match=r"3\.w1\.weight has \d+ elements, of which \d+ are mapped"):
        MappedSource(store, [*mapping[:index], half, *mapping[index + 1 :]], config)
    padded = replace(half, padded=True)
    with pytest.raises(ValueError, match=r"gate_up_proj has \d+ elements, of which \d+ are mapped"):
        MappedSource(store, [*mapping[:index], padded, *mapping[index + 1 :]], config)
    elsewhere = replace(mapping[index], parts=(replace(mapping[index].parts[0], ours="layers.9.x"),))
    with pytest.raises(ValueError, match=r"is mapped to layers\.9\.x, which the model does not have"):
        MappedSource(store, [*mapping[:index], elsewhere, *mapping[index + 1 :]], config)


class Sink:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        self.tensors[name] = tensor

    def close(self) -> None: ...


@pytest.mark.parametrize("room", [None, 0])
def test_rows_that_a_later_tensor_needs_are_kept_while_there_is_room(
    originals: Path, monkeypatch: pytest.MonkeyPatch, room: int | None
) -> None:
    from dmoe.checkpoint.formats import families, mapped

    source, kept = open_source(originals / "mixtral"), []
    read, count = source.read, {}

    def counted(name: str, index: int | None = None) -> torch.Tensor:
        count[name, index] = count.get((name, index), 0) + 1
        return read(name, index)

    class Units(mapped._Units):
        def take(self, unit: Any) -> torch.Tensor:
            tensor = super().take(unit)
            kept.append((self._bytes, sum(t.nbytes for t in self._kept.values())))
            return tensor

    source.read = counted  # type: ignore[method-assign]
    monkeypatch.setattr(mapped, "_Units", Units)
    if room is not None:
        monkeypatch.setattr(mapped, "CACHE_BYTES", room)
    sink = Sink()
    write_mapped(source, families.mixtral.mapping(source.config), sink)
    assert equal(sink.tensors, tensors(originals / "mixtral"))
    experts = {key: n for key, n in count.items() if key[1] is not None}
    assert len(experts) == 2 * 2 * 6  # two matrices, layers, experts
    assert {n for (name, _), n in experts.items() if "gate_up" in name} == {1 if room is None else 2}
    row = 4 * 2 * source.config.moe.intermediate_size * source.config.hidden_size
    assert all(counted == real for counted, real in kept)
    assert max(kept)[0] <= (6 * row if room is None else 0)
    assert kept[-1] == (0, 0)


def test_verify_compares_libraries_bits_and_logits(originals: Path, tmp_path: Path) -> None:
    source = originals / "gpt_oss"
    convert(source, tmp_path / "run", "dmoe")
    convert(tmp_path / "run", tmp_path / "bf16", "hf", dtype=torch.bfloat16)
    same = verify(source, tmp_path / "run")
    assert same.ok
    assert (same.libraries, same.unequal, same.num_tokens) == (("transformers", "dmoe"), (), 256)
    assert same.max_difference < 1e-5 < 0.1 < same.max_logit
    assert (same.top1, str(same)[:10]) == (1.0, "same model")
    rounded = verify(tmp_path / "run", tmp_path / "bf16", rounded=True)
    assert rounded.ok
    assert 1e-7 < rounded.kl < 0.02
    not_alike = verify(tmp_path / "run", tmp_path / "bf16")
    assert not not_alike.ok
    assert "layers.0.input_layernorm.weight" in not_alike.unequal
    # One number of one expert; and a configuration that means other maths for the same numbers.
    name = "model.layers.1.mlp.experts.gate_up_proj"
    convert(source, tmp_path / "off", "hf")
    rewritten(tmp_path / "off", lambda t: t[name][4, 0, 0].add_(1e-3))
    found = verify(source, tmp_path / "off")
    assert (found.ok, found.unequal) == (False, ("layers.1.mlp.experts.gate_up_proj",))
    assert str(found).startswith("NOT the same model: 1 tensors differ: layers.1.mlp.experts.gate_up_proj")
    convert(source, tmp_path / "other", "hf")
    hf = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(hf | {"num_experts_per_tok": 2}))
    found = verify(source, tmp_path / "other")
    assert (found.ok, found.unequal) == (False, ())
    assert str(found).startswith("NOT the same model, by transformers and transformers in fp32 over 256 tokens")


def test_figures_of_a_comparison() -> None:
    logits = torch.tensor([[[0.0, 2.0], [1.0, 0.0]]])
    others = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    found = compare(("a", "b"), logits, others)
    p, q = logits.double().softmax(-1), others.double().softmax(-1)
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()))
    assert (found.max_difference, found.max_logit, found.top1, found.num_tokens) == (1.0, 2.0, 0.5, 2)
    assert not found.ok
    assert not compare(("a", "b"), logits, others, rounded=True).ok
    assert not compare(("a", "b"), logits, logits * float("nan")).ok
    assert compare(("a", "b"), logits, logits).ok
    with pytest.raises(RunError, match=r"logits \[1, 2, 3\]: must be \[1, 2, 2\]"):
        compare(("a", "b"), logits, torch.zeros(1, 2, 3))
