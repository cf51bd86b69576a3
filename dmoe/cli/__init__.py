"""The command line: `dmoe VERB ...`. One small file a verb; this one chooses the verb and reports failures."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys

VERBS = {
    "train": "train a model",
    "upcycle": "make a mixture-of-experts model of a dense one",
    "generate": "continue a prompt with a trained model",
    "lora": "merge the adapters of a run into its weights, or export them for PEFT",
    "convert": "turn a model into the files of another tool: Hugging Face, Megatron, MegaBlocks, and back",
    "report": "write the HTML report of a run",
    "inspect": "show how a trained model routes a text: loads, what each expert gets, drift between checkpoints",
    "bench": "time the expert computation against a dense MLP and other implementations",
    "doctor": "show versions, devices and which backends work",
}

_USAGE = """usage: dmoe VERB [options]

Dropless mixture-of-experts language models in plain PyTorch.

{verbs}

dmoe VERB --help explains a verb. --debug anywhere shows the traceback of a failure."""


def usage() -> str:
    """The help of `dmoe` itself."""
    return _USAGE.format(verbs="\n".join(f"  {verb:10} {text}" for verb, text in VERBS.items()))


def main(argv: list[str] | None = None) -> int:
    """Run a verb. Returns the exit code: 0, 1 for a failed run, 2 for a wrong request."""
    args = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # generated text may hold what the console cannot show
        sys.stdout.reconfigure(errors="replace")
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if args else 2
    if args[0] == "--version":
        from dmoe import __version__

        print(f"dmoe {__version__}")
        return 0
    verb, *rest = args
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return _fail(f"unknown verb {verb!r}{hint}; dmoe --help lists them", 2)
    # Before torch loads OpenMP: threads spin for some microseconds between operators, so that they need not be woken,
    # but no longer, so that a core that is shared with other work is not wasted.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from dmoe.errors import DmoeError

    try:
        return importlib.import_module(f"dmoe.cli.{verb}").main(rest)
    except DmoeError as error:
        if debug:
            raise
        return _failed(error, error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of a pipe, such as head, went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            raise
        return _failed(error, 1)


def _failed(error: Exception, code: int) -> int:
    """Print one line about the error; of several ranks one does."""
    from dmoe.errors import DmoeError

    message: str | None = str(error) if isinstance(error, DmoeError) else f"{type(error).__name__}: {error}"
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from dmoe.train.failures import line_to_print

        message = line_to_print(error)
    if message is None:
        return code
    return _fail(message if isinstance(error, DmoeError) else f"{message} (--debug shows where)", code)


def _fail(message: str, code: int) -> int:
    print("dmoe: error: " + " ".join(message.split()), file=sys.stderr)
    return code
