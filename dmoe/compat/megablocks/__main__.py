"""Run a program written for MegaBlocks, unchanged, on this package.

    python -m dmoe.compat.megablocks SCRIPT [ARGUMENT ...]
    python -m dmoe.compat.megablocks -m MODULE [ARGUMENT ...]
    torchrun --nproc_per_node 8 -m dmoe.compat.megablocks SCRIPT [ARGUMENT ...]

`import megablocks` in the program gives dmoe.compat.megablocks, also in the processes that it spawns with
`multiprocessing`; not in other programs that it starts, unless it starts them by this command. Otherwise the program
sees what it would see under `python SCRIPT` or `python -m MODULE`, except that torch is loaded already: what torch
reads from the environment as it loads (OMP_NUM_THREADS) is set outside.
"""

from __future__ import annotations

import os
import runpy
import sys

from dmoe.compat.megablocks.installation import install

USAGE = "usage: python -m dmoe.compat.megablocks (SCRIPT | -m MODULE) [ARGUMENT ...]"


def main(arguments: list[str]) -> int:
    """Run the program that the arguments name, in this process; returns the exit code if there is none to run."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    as_module = bool(arguments) and arguments[0] == "-m"
    program = arguments[1:] if as_module else arguments
    if not program or (program[0].startswith("-") and not as_module):
        print(USAGE, file=sys.stderr)
        return 2
    if not as_module and not os.path.exists(program[0]):
        print(f"{USAGE}\nSCRIPT is {program[0]!r}: must be a file", file=sys.stderr)
        return 2
    install()
    sys.argv = program
    _set_search_path(program[0], as_module)
    if as_module:
        runpy.run_module(program[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program[0], run_name="__main__")
    return 0


def _set_search_path(program: str, as_module: bool) -> None:
    """As Python does it: a script finds its neighbours first, a module what is in the current directory (-P: neither).

    Then comes the entry by which spawned processes find `megablocks`.
    """
    unsafe = not getattr(sys.flags, "safe_path", False)
    if unsafe and not as_module:
        sys.path[0] = os.path.dirname(os.path.realpath(program))
    sys.path.insert(1 if unsafe else 0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "path_entry"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
