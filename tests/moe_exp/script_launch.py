"""Starting the scripts of moe_exp/: as a person does, and as ranks that cost little."""

import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

from ranks import run_ranks

FOLDER = Path(__file__).resolve().parents[2] / "moe_exp"
UNSET = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def environment(**values: object) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in UNSET}
    return {**inherited, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in values.items()}}


def torchrun(
    script: str | Path, *arguments: str, nproc: int = 2, timeout: float = 90, **values: object
) -> subprocess.CompletedProcess:
    """torchrun with `values` in the environment, from inside moe_exp/."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={nproc}", "--master_addr=127.0.0.1"]
    command += [f"--master_port={free_port()}", str(script), *arguments]
    return subprocess.run(
        command, cwd=FOLDER, env=environment(**values), capture_output=True, text=True, timeout=timeout
    )


def start(script: str, *arguments: str, **values: object) -> subprocess.Popen:
    """A script as one rank, with `values` in the environment and no torchrun."""
    command = [sys.executable, script, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=FOLDER, env=environment(**values), stdout=pipe, stderr=pipe, text=True)


def forked(script: str | Path, *arguments: str, output: Path, nproc: int = 2, **values: object) -> str:
    """What a script prints as ranks of `run_ranks`, with `values` in the environment; raises if a rank fails.

    The variables are those of a start by hand: rank 0 hosts the store. For what is not about the start itself.
    """
    shared = {"WORLD_SIZE": nproc, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **values}
    output.mkdir()
    try:
        run_ranks(_rank_main, (str(FOLDER / script), arguments, shared, output), nproc)
    except Exception:
        print("\n".join(file.read_text()[-3000:] for file in sorted(output.iterdir())))  # pytest shows it
        raise
    return "".join((output / f"rank{rank}").read_text() for rank in range(nproc))


def _rank_main(rank: int, script: str, arguments: tuple[str, ...], values: dict[str, object], output: Path) -> None:
    with (output / f"rank{rank}").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name in UNSET:
        os.environ.pop(name, None)
    os.environ.update({name: str(value) for name, value in values.items()}, RANK=str(rank))
    os.chdir(FOLDER)
    sys.path.insert(0, str(FOLDER))
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
    sys.stdout.flush()


def diagnosis(process: subprocess.Popen) -> str:
    """What a script says that ends with exit code 1 and no stack trace."""
    _, err = process.communicate(timeout=240)
    assert process.returncode == 1, err
    assert "Traceback" not in err
    return err
