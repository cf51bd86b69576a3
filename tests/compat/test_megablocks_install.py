"""`megablocks` by name: the runner with a program that knows nothing of this package, and what `install` refuses."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dmoe.compat.megablocks import __main__ as runner
from dmoe.compat.megablocks.installation import install
from dmoe.errors import ConfigError

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("megablocks_script.py")


def test_ranks_of_torchrun_and_a_process_that_one_spawns(tmp_path: Path) -> None:
    unset = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc_per_node=2"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", "-m", "dmoe.compat.megablocks"]
    done = subprocess.run(
        [*command, str(SCRIPT), "a", "--b", "-m"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "rank = 0 is here\nrank = 1 is here\n"


@pytest.fixture
def search_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`sys.path` and `sys.argv` as under `python -m` in `tmp_path`, to be changed by the runner; `install` left out."""
    monkeypatch.setattr(runner, "install", lambda: None)
    monkeypatch.setattr(sys, "argv", ["of the test"])
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return sys.path


def test_a_script(tmp_path: Path, search_path: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "folder" / "script.py"
    script.parent.mkdir()
    (script.parent / "neighbour_of_the_script.py").write_text("name = 'neighbour'\n")
    script.write_text(
        "import sys\nfrom neighbour_of_the_script import name\n"
        "print(__name__, name, sys.argv, __file__, sys.path[0])\nsys.exit(7)\n"
    )
    link = tmp_path / "link.py"
    link.symlink_to(script)
    with pytest.raises(SystemExit, match=r"^7$"):
        runner.main([str(link), "-m", "b"])
    want = f"__main__ neighbour {[str(link), '-m', 'b']} {link} {script.parent}\n"
    assert capsys.readouterr().out == want
    assert str(tmp_path) not in search_path[:2]
    assert search_path[1].endswith("path_entry")


def test_a_module(tmp_path: Path, search_path: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "package_of_a_user"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "tool.py").write_text("import sys\nprint(__name__, __spec__.name, sys.argv, sys.path[0])\n")
    assert runner.main(["-m", "package_of_a_user.tool", "-x", "1"]) == 0
    argv = [str(package / "tool.py"), "-x", "1"]
    assert capsys.readouterr().out == f"__main__ package_of_a_user.tool {argv} {tmp_path}\n"
    assert search_path[1].endswith("path_entry")


@pytest.mark.parametrize("arguments", [[], ["-m"], ["-x", "y.py"], ["no_such_script.py"]])
def test_a_request_that_names_no_program(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("usage: python -m dmoe.compat.megablocks (SCRIPT | -m MODULE)")
    assert ("'no_such_script.py': must be a file" in captured.err) == bool(arguments and arguments[0][0] == "n")
    assert runner.main(["--help"]) == 0


@pytest.mark.parametrize("name", ["megablocks", "megablocks.layers"])
def test_another_megablocks_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for known in [known for known in sys.modules if known.partition(".")[0] == "megablocks"]:
        monkeypatch.delitem(sys.modules, known)
    other = ModuleType(name)
    other.__file__ = "/site-packages/megablocks.py"
    monkeypatch.setitem(sys.modules, name, other)
    with pytest.raises(ConfigError, match=rf"^{name} is /site-packages/megablocks.py: must not be imported before"):
        install()
    registered = [known for known in sys.modules if known.partition(".")[0] == "megablocks"]
    assert registered == [name]
    assert sys.modules[name] is other
