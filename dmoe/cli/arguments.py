"""argparse for the small verbs, with errors as one line and the nearest valid name."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from dmoe.cli.options import nearest
from dmoe.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises `ConfigError` where the standard one prints usage and exits."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        hint = ""
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            hint = nearest(unknown.group(1), flags)
        raise ConfigError(f"{self.prog}: {message}{hint}")
