"""Conversions between Hugging Face directories and runs: the same bytes back, and nothing half done or half right.

What they read, and how two models are compared: test_formats_sources.py.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from ranks import run_ranks
from safetensors.torch import load_file
from torch.multiprocessing import ProcessExitedException

import dmoe
from dmoe.checkpoint import find_checkpoints, verify_checkpoint
from dmoe.checkpoint.formats import convert, open_source, read_config, tokenizer_file
from dmoe.config import config_to_yaml
from dmoe.data.tokenizer import load_tokenizer, train_bpe
from dmoe.errors import ConfigError, RunError
from tests.checkpoint.convert_cases import content, equal, killed_while_writing, rewritten, save_originals, tensors
from tests.checkpoint.family_cases import CASES, ours, theirs

# Matrices an expert; three experts and a tied head; transposed, interleaved and biases; a buffer and latents; fused.
TESTED = ["mixtral", "mixtral-all-experts", "gpt_oss", "deepseek_v3", "granitemoe"]

pytestmark = pytest.mark.filterwarnings("ignore:.*has no tokenizer.json")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what save_pretrained writes for each case, and CASE-bf16: in bf16 and several files."""
    root = save_originals(tmp_path_factory.mktemp("originals"), TESTED)
    theirs("mixtral").bfloat16().save_pretrained(root / "mixtral-bf16", max_shard_size="20KB")
    theirs.cache_clear()
    return root


@pytest.fixture
def mixtral(originals: Path, tmp_path: Path) -> Path:
    """A copy of it that may be changed."""
    return Path(shutil.copytree(originals / "mixtral", tmp_path / "mixtral"))


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


def test_a_killed_conversion_leaves_nothing_under_the_name(mixtral: Path, tmp_path: Path) -> None:
    with pytest.raises(ProcessExitedException) as ended:
        run_ranks(killed_while_writing, (mixtral, tmp_path / "out"), 1)
    assert ended.value.signal_name == "SIGKILL"
    left = {p.name for p in tmp_path.iterdir()} - {"mixtral"}
    assert len(left) == 1
    assert left.pop().startswith(".out.tmp-")
    convert(mixtral, tmp_path / "out", "hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mixtral", "out"]


def test_what_a_run_is_written_as(mixtral: Path, tmp_path: Path) -> None:
    from dmoe.checkpoint.formats.dmoe_run import read_run_config

    convert(mixtral, tmp_path / "run", "dmoe")
    config = read_run_config(tmp_path / "run")
    assert config.model == read_config(mixtral)
    assert config.run_dir == str(tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").read_text() == config_to_yaml(config)
    assert set(CASES) >= set(TESTED)
