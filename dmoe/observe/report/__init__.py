"""The HTML report of a run: one page that needs nothing but a browser, its figures as JSON and its pictures as PNG."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dmoe.errors import RunError
from dmoe.observe.files import write_bytes

if TYPE_CHECKING:
    from dmoe.observe.plots import Picture

__all__ = ["write_comparison", "write_report"]


def write_report(run_dir: Path, *, png: bool = True) -> Path:
    """Write `run_dir`/report.html, report.json and, with `png`, plots/*.png from what is there; the page's path.

    Works on a run that is still going, was interrupted or resumed, and without config.yaml, model.json or sample.txt.
    `ConfigError` if `run_dir` is not a folder with at least one train or eval line in its metrics.jsonl; `RunError` if
    that file is damaged or the report cannot be written.
    """
    from dmoe.observe.report.content import figures_json, load_content
    from dmoe.observe.report.draw import draw
    from dmoe.observe.report.page import render_page

    run_dir = Path(run_dir)
    content = load_content(run_dir)
    pictures = draw(content, png)
    files = {"report.html": render_page(content, pictures).encode(), "report.json": figures_json(content)}
    _write(run_dir, files, [picture for group in pictures.values() for picture in group], run_dir / "plots")
    return run_dir / "report.html"


def write_comparison(run_dir: Path, other_dir: Path, *, png: bool = True) -> Path:
    """Write `run_dir`/against-NAME.html, against-NAME.json and, with `png`, plots/against-NAME/*.png: `run_dir` beside
    `other_dir`, whose folder is called NAME and stays as it is. Errors as in `write_report`, for either run."""
    from dmoe.observe.report.compare import compare

    run_dir = Path(run_dir)
    name, page, figures, pictures = compare(run_dir, Path(other_dir), png)
    files = {f"against-{name}.html": page.encode(), f"against-{name}.json": figures}
    _write(run_dir, files, pictures, run_dir / "plots" / f"against-{name}")
    return run_dir / f"against-{name}.html"


def _write(run_dir: Path, files: dict[str, bytes], pictures: Iterable[Picture], plots: Path) -> None:
    try:
        drawn = [picture for picture in pictures if picture.png]
        if drawn:
            plots.mkdir(parents=True, exist_ok=True)
        for picture in drawn:
            write_bytes(plots / f"{picture.name}.png", picture.png)
        for name, content in files.items():
            write_bytes(run_dir / name, content)
    except OSError as error:
        raise RunError(f"cannot write the report in {run_dir}: {error.strerror}") from error
