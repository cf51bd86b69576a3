"""The benchmark of conversions runs, compares what comes back, and reports both ways."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import convert_memory


def test_report(tmp_path, capsys):
    arguments = ["--smoke", "--folder", str(tmp_path), "--json", str(tmp_path / "report.json")]
    assert convert_memory.main(arguments) == 0
    there, back = json.loads((tmp_path / "report.json").read_text())
    assert (there["to"], back["to"]) == ("dmoe", "hf")
    assert 0 < there["peak_gb"] < 2
    assert back["gb"] > 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
