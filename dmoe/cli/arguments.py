"""argparse for the small verbs, with errors as one line and the nearest valid name."""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn

from dmoe.config.overrides import nearest
from dmoe.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises `ConfigError` where the standard one prints usage and exits."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As usual, but a mistyped option is reported before a required one that is missing because of it."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        for arg in args or ():
            name = arg.partition("=")[0]
            if re.fullmatch(r"--[a-zA-Z][\w-]*", name) and name not in flags:
                raise ConfigError(f"{self.prog}: unrecognized arguments: {name}{nearest(name, flags)}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}")
