"""A directory to put on the module search path: `import megablocks` then finds what gives way to our package.

Processes that a program spawns take over its search path, but not its imported modules; and where a program cannot be
started by `python -m dmoe.compat.megablocks`, this directory in PYTHONPATH does the same.
"""
