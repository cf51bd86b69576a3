"""Imported as `megablocks`, it puts dmoe.compat.megablocks in its own place."""

import sys

if __name__ == "megablocks":
    from dmoe.compat.megablocks.installation import install

    del sys.modules[__name__]
    install()
