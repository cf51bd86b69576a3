"""The debugger on a real terminal: plain programs, children, and ranks of torchrun."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import pytest
from pseudo_terminal import Terminal, environment, torchrun


def write(folder: Path, code: str) -> Path:
    path = folder / "program.py"
    path.write_text(textwrap.dedent(code))
    return path


def test_steps_in_the_callers_frame_and_leaves_the_terminal_sane(tmp_path):
    script = write(tmp_path, """
        from multiprocessing_pdb import MultiprocessingPdb
        Tra = MultiprocessingPdb().set_trace
        def double(n):
            x = n * 2
            Tra()
            y = x + 1
            return y
        print("result", double(4))
    """)  # fmt: skip
    terminal = Terminal([sys.executable, str(script)], environment(tmp_path))
    terminal.expect("-> y = x + 1\n(Pdb main pid ")
    terminal.send("p x * 100")
    terminal.expect("\n800\n")
    terminal.send("n")
    terminal.expect("-> return y")
    terminal.send("!y = 70")
    terminal.expect("(Pdb")
    terminal.send("c")
    terminal.expect("result 70")
    assert terminal.echoes()
    assert terminal.end() == 0


def test_spawned_child_and_worker_and_breakpoint(tmp_path):
    """Their standard input is /dev/null."""
    script = write(tmp_path, """
        import multiprocessing as mp
        from multiprocessing_pdb import MultiprocessingPdb
        Tra = MultiprocessingPdb().set_trace
        class Data:
            def __len__(self):
                return 2
            def __getitem__(self, i):
                if i == 1:
                    breakpoint()
                    i += 10
                return i
        def child(queue):
            secret = 41
            Tra()
            queue.put(secret + 1)
        if __name__ == "__main__":
            from torch.utils.data import DataLoader
            context = mp.get_context("spawn")
            queue = context.Queue()
            process = context.Process(target=child, args=(queue,), name="helper")
            process.start()
            print("from the child:", queue.get())
            process.join()
            print("loaded", [int(x) for x in DataLoader(Data(), batch_size=1, num_workers=1)])
    """)  # fmt: skip
    env = environment(tmp_path, PYTHONBREAKPOINT="multiprocessing_pdb.set_trace")
    terminal = Terminal([sys.executable, str(script)], env)
    terminal.expect("(Pdb helper pid ")
    terminal.send("secret = 99")
    terminal.expect("(Pdb helper")
    terminal.send("c")
    terminal.expect("from the child: 100")
    terminal.expect("-> i += 10")
    terminal.send("p i + 500")
    terminal.expect("501")
    terminal.send("q")
    terminal.expect("loaded [0, 11]")
    assert terminal.echoes()
    assert terminal.end() == 0


RANKS = """
    from datetime import timedelta
    import torch
    import torch.distributed as dist
    from multiprocessing_pdb import MultiprocessingPdb
    Tra = MultiprocessingPdb(ranks=SELECTED).set_trace
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    value = torch.tensor([10.0 + rank])
    dist.barrier()
    group = dist.new_group(timeout=timedelta(seconds=3))
    Tra()
    dist.all_reduce(value, group=group)
    print(f"rank {rank} has {value.item()}", flush=True)
"""


def test_ranks_speak_in_turn_and_outlive_the_timeout_of_their_group(tmp_path):
    script = write(tmp_path, RANKS.replace("SELECTED", '"all"'))
    terminal = Terminal(torchrun(2, script), environment(tmp_path))
    first = terminal.expect("(Pdb rank 0/2 pid", "(Pdb rank 1/2 pid")
    me, other = ("0", "1") if "rank 0" in first else ("1", "0")
    time.sleep(0.5)  # the other comes to its line too
    terminal.send("ranks")
    terminal.expect(f"-> {me:>7}  rank {me}/2")
    terminal.expect("(Pdb")
    terminal.send("all value.item() + 0.5")
    terminal.expect("rank 0/2 pid")
    terminal.expect(": 10.5\nrank 1/2 pid")
    terminal.expect(": 11.5\n")
    terminal.send("where all")
    terminal.expect("dist.all_reduce(value, group=group)\nrank 1/2")
    terminal.expect("(Pdb")
    terminal.send("rank 7")
    terminal.expect(f"rank '7' has not stopped; {other} has")
    terminal.send(f"rank {other}")
    terminal.expect(f"(Pdb rank {other}/2")
    terminal.send("p rank * 1000 + 7")
    terminal.expect(f"\n{int(other) * 1000 + 7}\n")
    terminal.send("c")
    terminal.expect(f"(Pdb rank {me}/2")
    time.sleep(4.5)  # the other waits in the collective meanwhile
    terminal.send("p rank * 1000 + 7")
    terminal.expect(f"\n{int(me) * 1000 + 7}\n")
    terminal.send("q")
    text = ""
    for _ in range(2):
        text += terminal.expect("rank 0 has 21.0", "rank 1 has 21.0")
    assert terminal.echoes()
    assert terminal.end() == 0
    assert "rank 0" in text and "rank 1" in text  # noqa: PT018


def test_four_ranks_with_redirected_output(tmp_path):
    script = write(tmp_path, RANKS.replace("SELECTED", "[0, 2, 3]"))
    logs = tmp_path / "logs"
    terminal = Terminal(torchrun(4, script, "--redirects", "3", "--log-dir", str(logs)), environment(tmp_path))
    waiting = {"0", "2", "3"}
    while waiting:
        prompt = terminal.expect(*(f"(Pdb rank {rank}/4" for rank in waiting))
        rank = prompt[len("(Pdb rank ")]
        waiting.remove(rank)
        terminal.send("p 'answer', rank + 100")
        terminal.expect(f"('answer', 10{rank})")
        terminal.send("c")
    assert terminal.end() == 0
    written = "".join(path.read_text() for path in sorted(logs.rglob("stdout.log")))
    assert all(f"rank {rank} has 46.0" in written for rank in range(4))
    assert "(Pdb" not in written


def test_leaves_a_job_that_ends_alone(tmp_path):
    """Its thread is never inside torch when the interpreter goes away, however often it looks."""
    script = write(tmp_path, """
        import torch.distributed as dist
        from multiprocessing_pdb import MultiprocessingPdb, timeouts
        timeouts._POLL_SECONDS = 0
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        groups = [dist.new_group() for _ in range(20)]
        MultiprocessingPdb()
    """)  # fmt: skip
    terminal = Terminal([sys.executable, str(script)], environment(tmp_path))
    assert terminal.end() == 0, terminal.text


def test_post_mortem_and_abort(tmp_path):
    script = write(tmp_path, """
        import multiprocessing_pdb
        multiprocessing_pdb.install_excepthook()
        def fail(n):
            inside = n + 1
            return inside / 0
        fail(6)
    """)  # fmt: skip
    terminal = Terminal([sys.executable, str(script)], environment(tmp_path))
    terminal.expect("ZeroDivisionError")
    terminal.expect("(Pdb main")
    terminal.send("p inside + 30")
    terminal.expect("\n37\n")
    terminal.send("abort")
    assert terminal.end() == 1


def test_killed_while_a_line_is_edited(tmp_path):
    script = write(tmp_path, """
        from multiprocessing_pdb import MultiprocessingPdb
        MultiprocessingPdb().set_trace()
        print("never")
    """)  # fmt: skip
    terminal = Terminal([sys.executable, str(script)], environment(tmp_path))
    terminal.expect("(Pdb main")
    end = time.monotonic() + 10
    while terminal.echoes() and time.monotonic() < end:  # until the editor has taken over, and no longer:
        time.sleep(0.0001)  # it may not wait for a key yet
    assert not terminal.echoes()
    os.kill(terminal.pid, signal.SIGTERM)
    while not terminal.echoes() and time.monotonic() < end:
        time.sleep(0.05)
    assert terminal.echoes()
    assert terminal.end() == -signal.SIGTERM


@pytest.mark.parametrize("background", [False, True])
def test_job_in_the_background_leaves_the_terminal_to_the_shell(tmp_path, background):
    script = write(tmp_path, """
        from multiprocessing_pdb import MultiprocessingPdb
        MultiprocessingPdb(timeout=0.5).set_trace()
        print("it went on")
    """)  # fmt: skip
    command = f"{sys.executable} {script} {'& wait' if background else ''}; echo shell ends"
    terminal = Terminal(["bash", "-ic" if background else "-c", f"set -m; {command}"], environment(tmp_path))
    if background:
        terminal.expect("nobody attached: it goes on")
    else:
        terminal.expect("(Pdb main")
        terminal.send("c")
    terminal.expect("it went on")
    terminal.expect("shell ends")
    terminal.end()
