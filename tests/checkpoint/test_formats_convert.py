"""Conversions between Hugging Face directories and runs: the same bytes back, and nothing half done or half right."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

import dmoe
from dmoe.checkpoint import find_checkpoints, verify_checkpoint
from dmoe.checkpoint.formats import SafetensorsStore, convert, kind_of, open_source, read_config, tokenizer_file
from dmoe.checkpoint.formats.mapped import write_mapped
from dmoe.checkpoint.formats.names import has_expert_rows, tensor_shapes
from dmoe.checkpoint.formats.verify import compare, verify
from dmoe.config import config_to_yaml
from dmoe.data.tokenizer import load_tokenizer, train_bpe
from dmoe.errors import ConfigError, RunError
from tests.checkpoint.family_cases import CASES, ours, theirs

ROOT = Path(__file__).parents[2]

# Matrices an expert; three experts and a tied head; transposed, interleaved and biases; a buffer and latents; fused.
TESTED = ["mixtral", "mixtral-all-experts", "gpt_oss", "deepseek_v3", "granitemoe"]

pytestmark = pytest.mark.filterwarnings("ignore:.*has no tokenizer.json")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what save_pretrained writes for each case, and CASE-bf16: in bf16 and several files."""
    root = tmp_path_factory.mktemp("originals")
    for case in TESTED:
        theirs(case).save_pretrained(root / case)
    theirs("mixtral").bfloat16().save_pretrained(root / "mixtral-bf16", max_shard_size="20KB")
    theirs.cache_clear()
    return root


@pytest.fixture
def mixtral(originals: Path, tmp_path: Path) -> Path:
    """A copy of it that may be changed."""
    return Path(shutil.copytree(originals / "mixtral", tmp_path / "mixtral"))


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(x.dtype == b[n].dtype and torch.equal(x, b[n]) for n, x in a.items())


@pytest.mark.parametrize("case", TESTED)
def test_files_go_through_a_run_and_through_fused_files_and_come_back(
    originals: Path, tmp_path: Path, case: str
) -> None:
    source = originals / case
    convert(source, tmp_path / "run", "dmoe")
    convert(tmp_path / "run", tmp_path / "back", "hf")
    assert content(tmp_path / "back") == content(source)
    convert(source, tmp_path / "fused", "hf", fused=True)
    convert(tmp_path / "fused", tmp_path / "unfused", "hf")
    assert content(tmp_path / "unfused") == content(source)
    assert content(tmp_path / "fused") != content(source) or case in ("gpt_oss", "granitemoe")
    # The run is whole, has our model's names, and loads as any other.
    (checkpoint,) = find_checkpoints(tmp_path / "run")
    verify_checkpoint(checkpoint)
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000000\n"
    for folder in ("run", "fused", "back"):
        model = dmoe.from_pretrained(tmp_path / folder)
        assert not model.training
        assert equal(dict(model.state_dict()), dict(ours(case).state_dict()))


def test_sharded_bf16_files_keep_every_tensor(originals: Path, tmp_path: Path) -> None:
    source = originals / "mixtral-bf16"
    assert len(list(source.glob("*.safetensors"))) > 2
    convert(source, tmp_path / "run", "dmoe")
    convert(tmp_path / "run", tmp_path / "back", "hf", shard_size=20_000)
    assert equal(tensors(tmp_path / "back"), tensors(source))
    assert content(tmp_path / "back")["config.json"] == content(source)["config.json"]
    indices = [json.loads(content(f)["model.safetensors.index.json"]) for f in (source, tmp_path / "back")]
    assert indices[0]["metadata"] == indices[1]["metadata"]
    assert indices[0]["weight_map"].keys() == indices[1]["weight_map"].keys()
    sizes = [sum(t.nbytes for t in load_file(f).values()) for f in (tmp_path / "back").glob("*.safetensors")]
    assert max(sizes) <= 20_000
    model = dmoe.from_pretrained(source, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.embed_tokens.weight, tensors(source)["model.embed_tokens.weight"])


def test_dtype_rounds_all_but_the_bias_of_the_choice(originals: Path, tmp_path: Path) -> None:
    source = originals / "deepseek_v3"
    for via in ("hf", "dmoe"):
        convert(source, tmp_path / via, via, dtype=torch.bfloat16)
    convert(tmp_path / "dmoe", tmp_path / "back", "hf")
    for name, tensor in tensors(source).items():
        wanted = tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()
        for folder in ("hf", "back"):
            assert torch.equal(tensors(tmp_path / folder)[name], wanted), name
            assert tensors(tmp_path / folder)[name].dtype == wanted.dtype, name
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "back"))
    assert after == before | {"dtype": "bfloat16"}


def test_config_json_keeps_what_we_have_no_field_for_and_takes_what_changed(mixtral: Path, tmp_path: Path) -> None:
    hf = json.loads((mixtral / "config.json").read_text()) | {"my_field": [1, {"a": "b"}], "torch_dtype": "float32"}
    del hf["dtype"]
    (mixtral / "config.json").write_text(json.dumps(hf))
    convert(mixtral, tmp_path / "run", "dmoe")
    convert(tmp_path / "run", tmp_path / "back", "hf")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == hf
    yaml = tmp_path / "run" / "config.yaml"
    text = yaml.read_text()
    assert "norm_eps: 1.0e-05" in text
    yaml.write_text(text.replace("norm_eps: 1.0e-05", "norm_eps: 1.0e-04"))
    convert(tmp_path / "run", tmp_path / "changed", "hf")
    after = json.loads((tmp_path / "changed" / "config.json").read_text())
    assert (after["my_field"], after["rms_norm_eps"]) == (hf["my_field"], 1e-4)
    assert read_config(tmp_path / "changed") == replace(read_config(mixtral), norm_eps=1e-4)
    # Without it there is a new one, that transformers takes.
    shutil.rmtree(tmp_path / "run" / "hf")
    convert(tmp_path / "run", tmp_path / "new", "hf")
    new = json.loads((tmp_path / "new" / "config.json").read_text())
    assert "my_field" not in new
    assert (new["model_type"], new["rms_norm_eps"], new["dtype"]) == ("mixtral", 1e-4, "float32")


def test_tokeniser_and_other_files_go_along(mixtral: Path, tmp_path: Path) -> None:
    tokenizer = train_bpe(["def f(x): return x\n" * 5], 270)
    tokenizer.save(mixtral / "tokenizer.json")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt"):
        (mixtral / name).write_text(json.dumps({"name": name}))
    (mixtral / "additional_chat_templates").mkdir()
    (mixtral / "additional_chat_templates" / "tools.jinja").write_text("x")
    (mixtral / "pytorch_model.bin").write_bytes(b"a pickle")
    convert(mixtral, tmp_path / "run", "dmoe")
    assert tokenizer_file(tmp_path / "run") == tmp_path / "run" / "tokenizer.json"
    assert load_tokenizer(tmp_path / "run").encode("def f") == tokenizer.encode("def f")
    convert(tmp_path / "run", tmp_path / "again", "dmoe")
    convert(tmp_path / "again", tmp_path / "back", "hf")
    wanted = content(mixtral)
    del wanted["pytorch_model.bin"]
    assert content(tmp_path / "back") == wanted


def rewritten(folder: Path, change: Any) -> Path:
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


GATE = "model.layers.0.block_sparse_moe.gate.weight"
WRONG: dict[str, tuple[Any, str]] = {
    "extra": (lambda t: t.update(stray=torch.zeros(1)), r"1 tensors are not of this kind of model: stray"),
    "many": (
        lambda t: t.update({f"x{i:02}": torch.zeros(1) for i in range(12)}),
        r"12 tensors .*: x00, .*x09 and 2 more",
    ),
    "missing": (lambda t: t.pop(GATE), rf"1 tensors of the model are missing: {GATE}"),
    "shape": (lambda t: t.update({GATE: torch.zeros(5, 32)}), rf"{GATE} has shape \[5, 32\]: must be \[6, 32\]"),
    "integers": (lambda t: t.update({GATE: t[GATE].to(torch.int8)}), rf"{GATE} is torch.int8: must be floating"),
}


@pytest.mark.parametrize("name", WRONG)
def test_tensors_that_do_not_fit_are_refused_by_file_and_name(mixtral: Path, tmp_path: Path, name: str) -> None:
    change, message = WRONG[name]
    with pytest.raises(RunError, match=message) as caught:
        convert(rewritten(mixtral, change), tmp_path / "run", "dmoe")
    assert str(mixtral / "model.safetensors") in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_computed_tables_and_a_repeated_tied_head_are_passed_over(originals: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(originals / "mixtral-all-experts", tmp_path / "old"))
    tied = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewritten(
        folder,
        lambda t: t.update({"lm_head.weight": tied.clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": tied}),
    )
    convert(folder, tmp_path / "new", "hf")
    assert content(tmp_path / "new") == content(originals / "mixtral-all-experts")


def test_wrong_requests(originals: Path, mixtral: Path, tmp_path: Path) -> None:
    def refused(message: str, *args: Any, **options: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            convert(*args, **options)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "mixtral"]

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    new, full = tmp_path / "new", tmp_path / "full"
    refused("--to is 'gguf': must be one of dmoe", mixtral, new, "gguf")
    refused("source is .*nowhere.*: must be an existing", tmp_path / "nowhere", new, "hf")
    refused(r"source is .*full.*: must be a Hugging Face directory \(config.json\)", full, new, "hf")
    refused("destination is .*full.*: must be new or an empty folder", mixtral, full, "hf")
    refused("destination is .*file.*: must be a folder", mixtral, full / "file", "hf", overwrite=True)
    refused("destination is .*mixtral.*: must be apart from", mixtral, mixtral, "hf", overwrite=True)
    refused("destination is .*: must be apart from", mixtral, tmp_path, "hf", overwrite=True)
    refused("--family is 'mixtrol': must be one of", mixtral, new, "hf", family="mixtrol")
    refused("--family is 'mixtral': must be left out with --to dmoe", mixtral, new, "dmoe", family="mixtral")
    refused("--fused is True: must be left out", mixtral, new, "dmoe", fused=True)
    refused("--tp: must be left out with --to hf", mixtral, new, "hf", tp=2)
    # A family that cannot hold the model, and one that is taken for another.
    refused(
        "qkv_bias is True: must be False in a Hugging Face model of type .mixtral.",
        originals / "gpt_oss",
        new,
        "hf",
        family="mixtral",
    )
    hf = json.loads((mixtral / "config.json").read_text())
    for changed, message in (
        ({"model_type": "mamba"}, "mixtral: config.json: model_type is 'mamba'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
    ):
        (mixtral / "config.json").write_text(json.dumps(hf | changed))
        refused(message, mixtral, new, "hf")
    (mixtral / "config.json").write_text(json.dumps(hf))
    (mixtral / "model.safetensors").rename(mixtral / "pytorch_model.bin")
    refused("must have model.safetensors or .*; pickled weights are not read", mixtral, new, "hf")
    assert (full / "file").read_text() == "mine"


def test_another_family_of_the_same_model_is_refused_by_its_tensors(mixtral: Path, tmp_path: Path) -> None:
    hf = json.loads((mixtral / "config.json").read_text())
    (mixtral / "config.json").write_text(json.dumps(hf | {"model_type": "mistral"}))
    with pytest.raises(RunError, match=r"\d+ tensors are not of this kind of model: .*block_sparse_moe.* and \d+ more"):
        open_source(mixtral)
    (mixtral / "config.json").write_text("[")
    with pytest.raises(RunError, match=r"config.json: is not valid JSON"):
        open_source(mixtral)


def test_overwrite_replaces_and_a_failure_leaves_what_was(originals: Path, mixtral: Path, tmp_path: Path) -> None:
    convert(mixtral, tmp_path / "out", "dmoe")
    before = content(tmp_path / "out")
    truncated = (mixtral / "model.safetensors").read_bytes()[:-1]
    source = open_source(mixtral)
    (mixtral / "model.safetensors").write_bytes(truncated)
    for to in ("hf", "dmoe"):
        with pytest.raises(RunError, match="is truncated"):
            convert(mixtral, tmp_path / "out", to, overwrite=True)
        assert content(tmp_path / "out") == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["mixtral", "out"]
    # While it is written, too: the file was whole when it was opened.
    from dmoe.checkpoint.formats.conversion import write_dmoe
    from dmoe.checkpoint.formats.publish import published

    with pytest.raises(RunError, match="truncated within"), published(tmp_path / "out", overwrite=True) as folder:
        write_dmoe(source, mixtral, folder, final=tmp_path / "out")
    assert content(tmp_path / "out") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mixtral", "out"]
    convert(originals / "mixtral", tmp_path / "out", "hf", overwrite=True)
    assert content(tmp_path / "out") == content(originals / "mixtral")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mixtral", "out"]


KILLED = """
import os, signal, sys
from dmoe.checkpoint.formats import SafetensorsSink, convert
write = SafetensorsSink.write
def die(self, name, tensor):
    write(self, name, tensor)
    if "layers.1" in name:
        os.kill(os.getpid(), signal.SIGKILL)
SafetensorsSink.write = die
convert(sys.argv[1], sys.argv[2], "hf")
"""


def test_a_killed_conversion_leaves_nothing_under_the_name(mixtral: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(mixtral), str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    left = {p.name for p in tmp_path.iterdir()} - {"mixtral"}
    assert len(left) == 1
    assert left.pop().startswith(".out.tmp-")
    convert(mixtral, tmp_path / "out", "hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mixtral", "out"]


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


def test_what_a_run_is_written_as(mixtral: Path, tmp_path: Path) -> None:
    from dmoe.checkpoint.formats.dmoe_run import read_run_config

    convert(mixtral, tmp_path / "run", "dmoe")
    config = read_run_config(tmp_path / "run")
    assert config.model == read_config(mixtral)
    assert config.run_dir == str(tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").read_text() == config_to_yaml(config)
    assert set(CASES) >= set(TESTED)


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
