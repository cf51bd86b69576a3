"""`dmoe inspect MODEL`: how a trained mixture of experts routes a text.

Writes a page with the load, entropy and confidence of every layer, what each expert gets, in words and in their
contexts, and which experts are picked together; the same as PNG files and JSON. With --against, also how far the
routing of another checkpoint is from it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dmoe.cli.arguments import Parser
from dmoe.config import DataConfig, ModelConfig, require
from dmoe.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from dmoe.data import Tokenizer
    from dmoe.models import Decoder
    from dmoe.observe.inspect import Inspection, Reading

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_CHARS_PER_TOKEN = 64  # a text is cut to that many characters for each token asked for, before it is encoded


class _Place(NamedTuple):
    """A model in files."""

    path: Path
    """What is loaded: a run, a checkpoint in it, or a directory of another format."""
    name: str
    """Of the run or directory, or on the hub."""
    title: str
    """The name, with the step of a run."""
    step: int
    """0 where there is none."""
    config: ModelConfig
    adapted: bool
    """Whether it is a run with adapters."""


def main(args: list[str]) -> int:
    """Write the page, print a table of the layers and the page's path."""
    options = _parse(args)
    for name, least in (("max_tokens", 1), ("seq_len", 2), ("batch_size", 1), ("show", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}: must be at least {least}")
    from dmoe.train.device import resolve_device

    device = resolve_device(options.device, "--device")
    place = _place(options.model, options.step, "model", "--step")
    other = _other_place(options, place)
    tokenizer = _tokenizer(place.path, options.tokenizer)
    ids_T, text_name = _read_ids(options, tokenizer)
    _check_ids(ids_T, tokenizer, place, other)
    bound = min(p.config.max_seq_len for p in (place, other) if p is not None)
    seq_len = min(options.seq_len or 512, bound)
    if (options.seq_len or 0) > bound:
        raise ConfigError(f"--seq-len is {options.seq_len}: must be at most model.max_seq_len ({bound})")
    reading = _read(place, ids_T, seq_len, options, device)
    beside = None if other is None else _read(other, ids_T, seq_len, options, device)
    inspection = _inspect(options, place, other, reading, beside, tokenizer, text_name)
    from dmoe.observe.inspect import write_inspection

    folder = options.out or _default_folder(options.model, place)
    page = write_inspection(inspection, folder, png=not options.no_png)
    _print_table(inspection)
    print(page)
    return 0


def _parse(args: list[str]) -> argparse.Namespace:
    parser = Parser(prog="dmoe inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="run directory of dmoe train, or any that dmoe convert reads")
    parser.add_argument("--step", type=int, help="of a run: the checkpoint of this step (default: the newest)")
    parser.add_argument("--text", help="a text file, a folder or .jsonl (default: from Python's standard library)")
    parser.add_argument("--text-field", default="text", help="key of the text in the lines of a .jsonl (text)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json, if the model has none beside it")
    parser.add_argument("--max-tokens", type=int, default=16384, help="tokens to read, at most (16384)")
    parser.add_argument("--seq-len", type=int, help="tokens that see one another (512, or what the model has)")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences at a time (4)")
    parser.add_argument("--device", default="auto", help='"auto", "cpu", "cuda" or "cuda:N" (auto)')
    parser.add_argument("--dtype", choices=list(_DTYPES), default="fp32", help="of the weights (fp32)")
    parser.add_argument("--show", type=int, default=40, help="tokens whose experts are shown one by one (40)")
    parser.add_argument("--layers", help="layers to show in detail, such as 0,5,11 (default: up to 12, evenly)")
    parser.add_argument("--against", help="another model with the same tokeniser, to compare the routing with")
    parser.add_argument("--against-step", type=int, help="compare with this step of --against, or of the model itself")
    parser.add_argument("--out", type=Path, help="folder to write (default: MODEL/inspect of a run, else inspect-NAME)")
    parser.add_argument("--no-png", action="store_true", help="leave plots/*.png out, which is half of the drawing")
    return parser.parse_args(args)


def _place(model: str, step: int | None, option: str, step_option: str) -> _Place:
    """Find a model. Errors name `option` and `step_option`, the arguments that it came from."""
    from dmoe.checkpoint import manifest
    from dmoe.checkpoint.formats import kind_of, read_config
    from dmoe.checkpoint.formats.dmoe_run import read_run_config, run_folder
    from dmoe.checkpoint.formats.load import local_folder

    path = local_folder(model)
    is_run = kind_of(path) == "dmoe"
    adapted = is_run and bool(read_run_config(path).train.lora.rank)
    if step is not None:
        wrong = f"{step_option} is {step}: must be"
        if not is_run or manifest.folder_step(path) is not None:
            raise ConfigError(f"{wrong} left out, as {option} {model!r} is no run directory")
        folders = {manifest.folder_step(folder): folder for folder in reversed(manifest.published_folders(path))}
        if step not in folders:
            known = ", ".join(str(s) for s in sorted(s for s in folders if s is not None)) or "none"
            raise ConfigError(f"{wrong} a step that {option} {model!r} has a checkpoint of: {known}")
        path = folders[step]
    if adapted and manifest.folder_step(path) is not None:
        raise ConfigError(f"{option} is {model!r}: a run with adapters must be inspected at its newest checkpoint")
    config = read_config(path)
    if not config.moe_layers():
        raise ConfigError(f"{option} is {model!r}: must have mixture-of-experts layers, but it is a dense model")
    whole = [folder for folder in manifest.published_folders(path) if manifest.looks_whole(folder)] if is_run else []
    found = manifest.folder_step(whole[0] if whole else path) if is_run else None
    name = (run_folder(path) if is_run else path).resolve().name if Path(model).expanduser().exists() else model
    title = name if found is None else f"{name}, step {found:,}"
    return _Place(path, name, title, found or 0, config, adapted)


def _other_place(options: argparse.Namespace, place: _Place) -> _Place | None:
    if options.against is None and options.against_step is None:
        return None
    if options.against is None:
        other = _place(options.model, options.against_step, "model", "--against-step")
    else:
        other = _place(options.against, options.against_step, "--against", "--against-step")
    if other.title == place.title:  # two directories of the same name
        other = other._replace(title=str(options.against or other.path))
    for field in ("moe_layers", "num_experts"):
        ours, theirs = (
            (p.config.moe_layers() if field == "moe_layers" else p.config.moe.num_experts) for p in (place, other)
        )
        require(ours == theirs, f"{field} of {other.title}", theirs, f"{ours}, as in {place.title}, to be compared")
    return other


def _tokenizer(path: Path, given: Path | None) -> Tokenizer:
    from dmoe.checkpoint.formats import tokenizer_file
    from dmoe.data import load_tokenizer

    file = given or tokenizer_file(path)
    if file is None:
        raise ConfigError(f"model is {str(path)!r}: must have a tokenizer.json; --tokenizer PATH names another one")
    return load_tokenizer(file)


def _read_ids(options: argparse.Namespace, tokenizer: Tokenizer) -> tuple[np.ndarray[Any, Any], str]:
    """Token ids, documents separated by the end mark, and what the text is called."""
    import numpy as np

    ids: list[int] = []
    try:
        for text in _texts(options.text, options.text_field):
            ids += tokenizer.encode(text[: _CHARS_PER_TOKEN * options.max_tokens])
            if len(ids) >= options.max_tokens:
                break
            ids.append(tokenizer.eos_id)
    except ConfigError as error:  # of the corpus, under the names that it has in a run
        message = str(error).replace("data.corpus", "--text").replace("data.text_field", "--text-field")
        raise ConfigError(message) from None
    if ids and ids[-1] == tokenizer.eos_id:
        ids.pop()
    name = "Python's standard library" if options.text is None else Path(options.text).name
    return np.array(ids[: options.max_tokens], dtype=np.int64), name


def _texts(text: str | None, field: str) -> Iterator[str]:
    """Documents; without a text those of the standard library that a run on it would hold out by default."""
    from dmoe.data import read_corpus

    config = DataConfig(corpus="stdlib" if text is None else text, text_field=field)
    for document in read_corpus(config):
        held_out = int.from_bytes(document.digest[:8], "big") / 2**64 < config.val_fraction
        if text is not None or held_out:
            yield document.text


def _check_ids(ids_T: np.ndarray[Any, Any], tokenizer: Tokenizer, place: _Place, other: _Place | None) -> None:
    """The ids are rows of both models, and mean the same in both."""
    from dmoe.checkpoint.formats import tokenizer_file
    from dmoe.data import load_tokenizer

    for model in (place, other):
        if model is not None and ids_T.max(initial=0) >= model.config.vocab_size:
            raise ConfigError(
                f"model.vocab_size of {model.title} is {model.config.vocab_size}: must be more than {ids_T.max()}, an "
                "id of the text: the tokeniser is another model's"
            )
    file = None if other is None else tokenizer_file(other.path)
    if other is None or file is None:
        return
    theirs = load_tokenizer(file)
    text = tokenizer.decode(ids_T.tolist())
    same = type(theirs) is type(tokenizer) and theirs.encode(text) == tokenizer.encode(text)
    if not same:
        raise ConfigError(f"--against is {other.title!r}: must have the same tokeniser; its {file} encodes differently")


def _load(place: _Place, dtype: torch.dtype, device: torch.device) -> Decoder:
    if place.adapted:
        from dmoe.checkpoint.formats.dmoe_run import read_run_config
        from dmoe.lora.load import load_adapted

        return load_adapted(place.path, read_run_config(place.path), device)[0].to(dtype)
    from dmoe.checkpoint.formats import from_pretrained

    return from_pretrained(place.path, dtype=dtype, device=device)


def _read(
    place: _Place, ids_T: np.ndarray[Any, Any], seq_len: int, options: argparse.Namespace, device: torch.device
) -> Reading:
    import sys

    import torch
    from rich.console import Console
    from rich.progress import Progress

    from dmoe.observe.inspect import read_text

    model = _load(place, getattr(torch, _DTYPES[options.dtype]), device)
    console = Console(file=sys.stderr)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(place.title, total=len(ids_T))
        return read_text(
            model, ids_T, seq_len=seq_len, batch_size=options.batch_size, device=device, step=place.step,
            name=place.title, progress=lambda done: progress.update(task, completed=done),
        )  # fmt: skip


def _inspect(
    options: argparse.Namespace, place: _Place, other: _Place | None, reading: Reading, beside: Reading | None,
    tokenizer: Tokenizer, text_name: str,
) -> Inspection:  # fmt: skip
    from dmoe.observe.inspect import TokenText, inspect_reading

    config = place.config
    mixtures, moe = len(config.moe_layers()), config.moe
    layers = f"{config.num_layers} layers" + ("" if mixtures == config.num_layers else f", {mixtures} of them MoE")
    line = f"{layers} \u00b7 {moe.num_experts} experts, top-{moe.top_k} \u00b7 {moe.routing} by {moe.score_function}"
    return inspect_reading(
        reading,
        TokenText(tokenizer.decode, tokenizer.encode, {tokenizer.eos_id: "\u27e8end\u27e9"}),
        title=place.title,
        model_line=line,
        text_name=text_name,
        bytes_V=tokenizer.token_bytes(),
        layers=_layer_list(options.layers),
        show=options.show,
        other=beside,
        other_title="" if other is None else other.title,
    )


def _layer_list(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        layers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--layers is {text!r}: must be numbers with commas between them, such as 0,5,11") from None
    return sorted(set(layers))


def _default_folder(model: str, place: _Place) -> Path:
    """Inside a run, which is ours; beside the reader for what may be read-only or shared."""
    run = Path(model)
    if (run / "config.yaml").is_file() and (run / "checkpoints").is_dir():
        return run / "inspect"
    return Path(f"inspect-{place.name.replace('/', '-')}")


def _print_table(inspection: Inspection) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from dmoe.observe.inspect.details import layer_numbers

    moved, console = inspection.moved, Console()
    names = ["layer", "max/mean", "dead", "entropy", "conf.", "margin", "special."]
    names += [] if moved is None else ["equal"]
    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("busiest")
    room = max(12, console.width - sum(len(name) + 2 for name in names))
    for place, row in enumerate(layer_numbers(inspection)):
        cells = [
            str(row["layer"]), f"{row['max_over_mean']:.2f}", str(row["dead"]), f"{row['entropy']:.3f}",
            f"{row['confidence']:.3f}", f"{row['margin']:.3f}", f"{row['specialization']:.0%}",
        ]  # fmt: skip
        cells += [] if moved is None else [f"{moved.equal_picks_L[place]:.1%}"]
        words = Text(_busiest(inspection, place), overflow="ellipsis", no_wrap=True)
        words.truncate(room, overflow="ellipsis")
        table.add_row(*cells, words)
    console.print(table)
    bits, reading = inspection.bits_per_byte, inspection.reading
    line = f"{inspection.title}: loss {reading.loss:.4f} nats per token"
    line += f", {bits:.4f} bits per byte" if bits == bits else ""
    print(f"{line} on {reading.summary.num_tokens:,} tokens of {inspection.text_name}")
    if inspection.other is not None:
        print(f"{inspection.other_title}: loss {inspection.other.loss:.4f}")


def _busiest(inspection: Inspection, place: int) -> str:
    """The first tokens of the experts with the highest load."""
    from dmoe.observe.inspect.details import token_rows

    reading, show = inspection.reading, inspection.tokens.show
    experts = (-reading.summary.load_LE[place]).argsort(kind="stable")[:4]
    return "  ".join(
        f"{expert}: " + " ".join(show(token) for token, _, _ in token_rows(reading, place, expert, 3))
        for expert in experts
    )
