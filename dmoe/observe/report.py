"""The HTML report of a run: one page that needs nothing but a browser, and the same pictures as PNG files."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dmoe.errors import ConfigError, RunError
from dmoe.observe.metrics_log import read_metrics

if TYPE_CHECKING:
    from dmoe.observe.plots import Picture

Record = dict[str, Any]
MISSING = "\u2013"  # an en dash


@dataclass(frozen=True)
class Run:
    """What a run directory says, each kind of line in step order without the lines that a resume made void."""

    name: str
    config_text: str
    config: dict[str, Any]
    model: dict[str, Any]
    sample: str
    train: list[Record]
    evals: list[Record]
    events: list[Record]


@dataclass(frozen=True)
class Card:
    """One key figure. `key` is its stable name in the page, as data-card."""

    key: str
    label: str
    value: str
    note: str = ""


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html and `run_dir`/plots/*.png from what is there; returns the page's path.

    Works on a run that is still going, was interrupted or resumed, and without config.yaml, model.json or sample.txt.
    `ConfigError` if `run_dir` is not a folder with at least one train or eval line in its metrics.jsonl; `RunError` if
    that file is damaged or the report cannot be written.
    """
    run_dir = Path(run_dir)
    run = load_run(run_dir)
    pictures = draw(run)
    page = render_page(run, pictures)
    try:
        (run_dir / "plots").mkdir(exist_ok=True)
        for group in pictures.values():
            for picture in group:
                _publish(run_dir / "plots" / f"{picture.name}.png", picture.png)
        _publish(run_dir / "report.html", page.encode())
    except OSError as error:
        raise RunError(f"cannot write the report in {run_dir}: {error.strerror}") from error
    return run_dir / "report.html"


def load_run(run_dir: Path) -> Run:
    """Read a run directory; errors as in `write_report`."""
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file():
        raise ConfigError(f"run is {str(run_dir)!r}: must be a folder that holds metrics.jsonl")
    records = read_metrics(metrics)
    measured = last_attempt(records)
    train = [record for record in measured if record["kind"] == "train"]
    evals = [record for record in measured if record["kind"] == "eval"]
    if not train and not evals:
        raise ConfigError(f"run is {str(run_dir)!r}: must have a train or eval line in metrics.jsonl")
    config_text = _text(run_dir / "config.yaml")
    return Run(
        name=run_dir.resolve().name,
        config_text=config_text,
        config=_mapping(config_text),
        model=_mapping(_text(run_dir / "model.json")),
        sample=_text(run_dir / "sample.txt"),
        train=train,
        evals=evals,
        events=[record for record in records if record.get("kind") == "event" and _has_step(record)],
    )


def last_attempt(records: Sequence[Record]) -> list[Record]:
    """The train and eval lines, in step order, that belong to the weights the run ended with.

    A run resumed from an earlier checkpoint goes over some steps again: each line makes void those before it in the
    file that are of a later step, and the one of its own step and kind.
    """
    kept: list[Record] = []
    for record in records:
        if record.get("kind") not in ("train", "eval") or not _has_step(record):
            continue
        while kept and kept[-1]["step"] > record["step"]:
            kept.pop()
        same_step = [i for i in range(max(0, len(kept) - 3), len(kept)) if kept[i]["step"] == record["step"]]
        for i in reversed(same_step):
            if _kind(kept[i]) == _kind(record):
                del kept[i]
        kept.append(record)
    return kept


def _kind(record: Record) -> tuple[str, bool]:
    """A validation on the whole text and one on a part of it may share a step, so they are two kinds."""
    return record["kind"], bool(record.get("whole"))


def _has_step(record: Record) -> bool:
    return isinstance(record.get("step"), (int, float))


def draw(run: Run) -> dict[str, list[Picture]]:
    """The pictures by section of the page; a section without data is left out."""
    from dmoe.observe import expert_plots, plots  # matplotlib

    sections: dict[str, list[Picture]] = {}
    with plots.style():
        learning = [plots.loss_curve(run.train, run.evals, run.events), plots.bits_per_byte_curve(run.evals)]
        if run.train:
            learning += [plots.learning_rate_curve(run.train), plots.grad_norm_curve(run.train)]
            sections["speed"] = [plots.tokens_per_second_curve(run.train), plots.step_time_curve(run.train)]
        sections["learning"] = learning
        records = expert_plots.expert_records(run.train)
        if records:
            sections["experts"] = [
                expert_plots.load_heat_map(records),
                expert_plots.load_imbalance(records),
                expert_plots.router_entropy(records),
                expert_plots.final_load(records[-1]),
                expert_plots.aux_loss_curve(records),
                expert_plots.z_loss_curve(records),
            ]
    return sections


def render_page(run: Run, pictures: dict[str, list[Picture]]) -> str:
    """The page as text; everything that comes from the run is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        run=run,
        status=status(run),
        model_line=model_line(run),
        cards=key_figures(run),
        pictures=pictures,
        layers=layer_rows(run),
    )


def status(run: Run) -> str:
    """How far the run is: "step 640 of 1,000"."""
    last = max(record["step"] for record in [*run.train, *run.evals])
    total = _get(run.config, "train", "steps")
    if not isinstance(total, int):
        return f"step {last:,}"
    return f"finished, {last:,} steps" if last >= total else f"step {last:,} of {total:,}"


def model_line(run: Run) -> str:
    """The model in one line; what is not known is left out."""
    moe = _last_moe(run)
    parts = []
    layers = _get(run.config, "model", "num_layers")
    if layers is not None:
        mixtures = len(moe.get("expert_load", []))
        mixed = isinstance(layers, int) and 0 < mixtures < layers
        kind = "" if mixed else "MoE " if mixtures else "dense "
        parts.append(f"{layers} {kind}layers" + (f", {mixtures} of them MoE" if mixed else ""))
    if moe:
        top_k = _get(run.config, "model", "moe", "top_k")
        parts.append(f"{len(moe['expert_load'][0])} experts" + (f", top-{top_k}" if top_k is not None else ""))
    total, active = run.model.get("num_params"), run.model.get("num_active_params")
    if total is not None:
        parts.append(
            f"{count(total)} parameters" + (f", {count(active)} active" if active not in (None, total) else "")
        )
    if run.train and run.train[-1].get("tokens") is not None:
        parts.append(f"{count(run.train[-1]['tokens'])} tokens trained")
    return " · ".join(parts)


def key_figures(run: Run) -> list[Card]:
    """The cards at the head of the page."""
    cards = [_compression_card(run), *_loss_cards(run)]
    speed, step = median(run.train, "tokens_per_second"), median(run.train, "step_seconds")
    step_note = "" if step is None else f"median; {step:.3g} s per step"
    speed_text = MISSING if speed is None else f"{speed:,.0f}"
    cards.append(Card("tokens_per_second", "Tokens per second", speed_text, step_note))
    memory = max((r["memory_gib"] for r in run.train if r.get("memory_gib") is not None), default=None)
    memory_note = "" if memory is None else f"peak memory {memory:.3g} GiB"
    cards.append(Card("time", "Training time", duration(training_seconds(run.train)), memory_note))
    mfu, tflops = median(run.train, "mfu"), median(run.train, "model_tflops")
    tflops_note = "" if tflops is None else f"median; {tflops:.3g} TFLOP/s"
    cards.append(Card("mfu", "Model FLOPs utilisation", MISSING if mfu is None else f"{mfu:.1%}", tflops_note))
    return cards + _expert_cards(run)


def _compression_card(run: Run) -> Card:
    label = "Validation bits per byte"
    evals = [record for record in run.evals if record.get("bits_per_byte") is not None]
    # The whole text is the better measure, however late a part was read after it.
    evals = [record for record in evals if record.get("whole")] or evals
    if not evals:
        return Card("bits_per_byte", label, MISSING, "no validation yet")
    bits, zlib = evals[-1]["bits_per_byte"], evals[-1].get("zlib_bits_per_byte")
    note = f"step {evals[-1]['step']:,}"
    if zlib:
        note = f"zlib -9: {zlib:.3f}, so {abs(1 - bits / zlib):.0%} {'fewer' if bits < zlib else 'more'} bits"
    return Card("bits_per_byte", label, f"{bits:.3f}", note)


def _loss_cards(run: Run) -> list[Card]:
    losses = [(record["loss"], record["step"]) for record in run.train if record.get("loss") is not None]
    if not losses:
        return [Card("best_loss", "Best training loss", MISSING), Card("last_loss", "Last training loss", MISSING)]
    best, step = min(losses)
    last = run.train[-1].get("loss")
    return [
        Card("best_loss", "Best training loss", f"{best:.3f}", f"nats per token, step {step:,}"),
        Card("last_loss", "Last training loss", "not finite" if last is None else f"{last:.3f}",
             f"nats per token, step {run.train[-1]['step']:,}"),
    ]  # fmt: skip


def _expert_cards(run: Run) -> list[Card]:
    """From the last line: the least balanced layer and the experts that got no token."""
    rows = layer_rows(run)
    known = [row for row in rows if row["max_over_mean"] is not None]
    if not rows:
        return []
    cards = []
    if known:
        worst = max(known, key=lambda row: row["max_over_mean"])
        note = f"max / mean load, layer {worst['layer']}"
        cards.append(Card("imbalance", "Most imbalanced layer", f"{worst['max_over_mean']:.2f}\u00d7", note))
    moe = _last_moe(run)
    experts = sum(len(layer) for layer in moe["expert_load"])
    dead = sum(row["dead_experts"] or 0 for row in rows)
    cards.append(Card("dead_experts", "Dead experts", f"{dead:,}", f"of {experts:,}, in the last log line"))
    return cards


def layer_rows(run: Run) -> list[dict[str, Any]]:
    """Each MoE layer's last max_over_mean, router_entropy, dead_experts, and its least and most loaded expert."""
    moe = _last_moe(run)
    rows = []
    for i, load in enumerate(moe.get("expert_load", [])):
        shares = [share for share in load if share is not None]
        row = {key: _item(moe.get(key), i) for key in ("max_over_mean", "router_entropy", "dead_experts")}
        row["layer"] = i if _item(moe.get("moe_layers"), i) is None else moe["moe_layers"][i]
        rows.append(row | {"least": min(shares, default=None), "most": max(shares, default=None)})
    return rows


def _last_moe(run: Run) -> Record:
    """The last train line with expert statistics; empty for a dense run."""
    return next((record for record in reversed(run.train) if record.get("expert_load")), {})


def training_seconds(train: Sequence[Record]) -> float | None:
    """Seconds of training; where a resumed process counted from 0 again, the sum over the processes."""
    before, last = 0.0, None
    for record in train:
        elapsed = record.get("elapsed_seconds")
        if elapsed is None:
            continue
        if last is not None and elapsed < last:
            before += last
        last = elapsed
    return None if last is None else before + last


def median(records: Sequence[Record], key: str) -> float | None:
    values = [record[key] for record in records if record.get(key) is not None]
    return statistics.median(values) if values else None


def count(value: float) -> str:
    """A count with its unit: 12300000 -> "12.3 M"."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:#.3g} {unit}" if value / size < 99.95 else f"{value / size:.0f} {unit}"
    return f"{value:g}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def _item(values: Any, i: int) -> Any:
    return values[i] if values and i < len(values) else None


def _get(config: dict[str, Any], *keys: str) -> Any:
    """A nested value of the config, None if any part of the way is missing."""
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _mapping(text: str) -> dict[str, Any]:
    """YAML (so JSON too) as a dict; empty if it is not one: the report shows what it can."""
    try:
        value = json.loads(text) if text.startswith("{") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def _publish(path: Path, content: bytes) -> None:
    """Write under a temporary name and rename, so that nobody sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
