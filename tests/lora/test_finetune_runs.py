"""Runs that start from given weights, with frozen parameters and with adapters, through the command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import checkpoint_names, error_line, losses

from dmoe.checkpoint import find_checkpoints, load_model_weights
from dmoe.checkpoint.dcp_io import read_dcp_metadata
from dmoe.cli import main
from dmoe.config import RunConfig
from dmoe.config.overrides import apply_overrides, read_yaml
from dmoe.generate import load_run
from dmoe.lora.load import load_adapted
from dmoe.models import Decoder
from dmoe.train.engine import build_engine

LORA = {"train.lora.rank": "4", "train.lora.targets": "attention,experts,router"}


def options(tiny: dict[str, str], run_dir: Path, **more: str) -> list[str]:
    """Of a short run, without its model, which comes from elsewhere."""
    kept = {name: value for name, value in tiny.items() if not name.startswith(("model.", "data.tokenizer"))}
    kept |= {"train.steps": "4", "train.eval_every": "0", "checkpoint.every": "2", "run_dir": str(run_dir)}
    return [f"--{name}={value}" for name, value in (kept | more).items()]


def config_of(run_dir: Path) -> RunConfig:
    return apply_overrides(RunConfig(), read_yaml(run_dir / "config.yaml"))


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    model = Decoder.on_meta(config_of(run_dir).model).to_empty(device="cpu")
    load_model_weights(run_dir, model)
    return model.state_dict()


def saved_names(run_dir: Path) -> set[str]:
    return set(read_dcp_metadata(find_checkpoints(run_dir)[0]).state_dict_metadata)


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training."""
    monkeypatch.setattr("dmoe.observe.report.write_report", lambda run_dir: run_dir)


def test_a_run_starts_from_another_and_its_checkpoint_wins(
    tiny: dict[str, str], base_run: Path, tmp_path: Path
) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(base_run, base)
    (base / "hf").mkdir()  # as of a run that was converted: an export of ours needs it again
    (base / "hf" / "config.json").write_text('{"model_type": "mixtral"}')
    (base / "hf" / "generation_config.json").write_text("{}")
    args = options(tiny, run, **{"train.freeze": "router,attention,embed_tokens"})
    assert main(["train", "--init-from", str(base), *args]) == 0
    config = config_of(run)
    assert config.model == config_of(base).model
    assert config.train.init_from == str(base)
    assert (run / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert {file.name for file in (run / "hf").iterdir()} == {"config.json", "generation_config.json"}
    start = {name: p.detach() for name, p in build_engine(config, torch.device("cpu")).parts[0].named_parameters()}
    before, after = weights(base), weights(run)
    for name, value in start.items():
        assert torch.equal(value, before[name]), name
        frozen = any(word in name for word in ("router", "self_attn", "embed_tokens"))
        assert torch.equal(before[name], after[name]) == frozen, name
        assert (f"optimizer.state.{name}.exp_avg" in saved_names(run)) != frozen

    shutil.rmtree(base)  # the run has all that it needs
    shutil.rmtree(find_checkpoints(run)[0])
    assert main(["train", "--resume", str(run)]) == 0
    assert max(losses(run)) == 4  # which compares the steps that were done twice, to the bit
    assert all(torch.equal(value, after[name]) for name, value in weights(run).items())


def test_adapters_resume_to_the_bit_and_are_all_that_is_saved(
    tiny: dict[str, str], base_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run, merged, exported = (tmp_path / name for name in ("base", "run", "merged", "exported"))
    shutil.copytree(base_run, base)
    sample = {"train.sample_tokens": "2"}
    assert main(["train", "--init-from", str(base), *options(tiny, run, **LORA, **sample)]) == 0
    assert (run / "sample.txt").read_text().startswith("def ")
    model, step = load_adapted(run, config_of(run))
    assert step == 4
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    saved = {name.removeprefix("model.") for name in saved_names(run) if name.startswith("model.")}
    assert saved == trained
    assert {name.split(".")[2] for name in saved} == {"self_attn", "mlp"}
    final = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert all(p.abs().max() > 0 for name, p in final.items() if name.endswith("lora_B"))
    assert all(torch.equal(p, final[name]) for name, p in weights(base).items() if name in final)

    shutil.rmtree(find_checkpoints(run)[0])
    assert checkpoint_names(run) == ["step-00000002"]
    assert main(["train", "--resume", str(run)]) == 0
    assert max(losses(run)) == 4
    again = load_adapted(run, config_of(run))[0]
    assert all(torch.equal(p, final[name]) for name, p in again.named_parameters())

    assert main(["lora", "merge", str(run), str(merged)]) == 0
    whole, _ = load_run(merged, config_of(merged), torch.device("cpu"))
    ids = torch.arange(40).view(2, 20)
    torch.testing.assert_close(whole(ids), model(ids), rtol=1e-4, atol=1e-5)
    assert not torch.equal(whole.layers[0].self_attn.q_proj.weight, final["layers.0.self_attn.q_proj.weight"])
    assert main(["lora", "export", str(run), str(exported)]) == 0
    assert len(load_file(exported / "adapter_model.safetensors")) == len(trained)
    capsys.readouterr()

    assert main(["lora", "merge", str(run), str(merged)]) == 2
    assert "must not exist yet" in error_line(capsys.readouterr().err)
    assert main(["lora", "export", str(base), str(tmp_path / "no")]) == 2
    assert "must be one with adapters" in error_line(capsys.readouterr().err)
    assert main(["train", "--init-from", str(run), *options(tiny, tmp_path / "no")]) == 2
    assert f"dmoe lora merge {run} DST" in error_line(capsys.readouterr().err)
    assert main(["train", "--init-from", str(merged), *options(tiny, tmp_path / "next", **{"train.steps": "1"})]) == 0
    capsys.readouterr()
    path = find_checkpoints(base)[0] / "manifest.json"
    path.write_text(path.read_text() + "\n")
    assert main(["train", "--resume", str(run), "--train.steps=5"]) == 2
    assert "must be the weights that the adapters of this run were trained on" in error_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"model.hidden_size": "64"}, "model.hidden_size is '64': must be 32 or left out"),
        ({"model.moe.num_experts": "8"}, "model.moe.num_experts is '8': must be 5 or left out"),
        ({"model.num_heads": "3", "model.num_kv_heads": "3"}, "model.num_heads is '3': must be 2 or left out"),
        ({"data.tokenizer": "bytes"}, "data.tokenizer is 'bytes': must be left out with --init-from"),
        ({"preset": "tiny-dense"}, "preset is 'tiny-dense' with --init-from"),
        ({"train.freeze": "ruoter"}, "train.freeze is 'ruoter': must be a part of a parameter's name, such as router"),
        ({"train.freeze": "*"}, "train.freeze is ('*',): must be patterns that leave a parameter to train"),
        ({"train.lora.rank": "4", "train.lora.targets": "expert"}, "train.lora.targets is 'expert': must be"),
        ({"train.init_from": "nowhere"}, "nowhere': must be a folder"),
    ],
)
def test_requests_that_contradict(
    more: dict[str, str], words: str, tiny: dict[str, str], base_run: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    args = [] if "train.init_from" in more else ["--init-from", str(base_run)]
    assert main(["train", *args, *options(tiny, tmp_path / "run", **more)]) == 2
    assert words in error_line(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_options_that_change_no_shape_are_taken(tiny: dict[str, str], base_run: Path, tmp_path: Path) -> None:
    more = {"model.moe.aux_loss_coef": "0.5", "train.steps": "1", "model.hidden_size": "32"}
    assert main(["train", f"--init_from={base_run}", *options(tiny, tmp_path / "run", **more)]) == 0
    config = config_of(tmp_path / "run").model
    assert (config.moe.aux_loss_coef, config.moe.num_experts) == (0.5, 5)
