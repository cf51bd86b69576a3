"""From figures and pictures to one HTML file that needs nothing but a browser: no script, no address outside itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmoe.observe.report.content import Content
from dmoe.observe.report.maps import load_maps
from dmoe.observe.report.routing import LIFT_SCALE

if TYPE_CHECKING:
    from dmoe.observe.plots import Picture

_TEMPLATES = Path(__file__).parent.parent
_WHITE = str.maketrans({"\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d", " ": "\u00b7"})


def render_template(name: str, **values: Any) -> str:
    """The template `name` of dmoe/observe as text; everything that comes from a run is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    environment.filters["bytes"] = size
    return environment.get_template(name).render(**values)


def render_page(content: Content, pictures: dict[str, list[Picture]]) -> str:
    """The page of one run."""
    return render_template(
        "report.html.jinja",
        content=content,
        run=content.run,
        cards=content.cards,
        pictures=pictures,
        maps=load_maps(content.experts) if content.experts else None,
        lift_legend=LIFT_SCALE.legend,
    )


def visible(text: str) -> str:
    """A token's text with its white space shown."""
    return text.translate(_WHITE)


def size(value: float | None) -> str:
    """Bytes for people."""
    if value is None:
        return "\u2013"
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.0f} B"
