"""The pictures of a run's page, by section."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dmoe.observe.report.content import Content, has
from dmoe.observe.report.figures import Experts
from dmoe.observe.report.run import Run

if TYPE_CHECKING:
    from dmoe.observe.plots import Picture


def draw(content: Content, png: bool) -> dict[str, list[Picture]]:
    """The pictures by section of the page; a section without data is left out. Without `png` only for the page."""
    from dmoe.observe import plots  # matplotlib

    run = content.run
    sections: dict[str, list[Picture]] = {}
    with plots.style(png):
        sections["learning"] = [
            plots.loss_curve(run.train, run.evals, run.events),
            plots.bits_per_byte_curve(run.evals),
        ]
        if run.train:
            sections["learning"] += [plots.learning_rate_curve(run.train), plots.grad_norm_curve(run.train)]
            sections["speed"] = [plots.tokens_per_second_curve(run.train), plots.step_time_curve(run.train)]
        if content.experts:
            sections["experts"] = _experts(content.experts, png)
        if content.rank_lines:
            sections["ranks"] = _ranks(run, content)
        if content.routing:
            sections["routing"] = _routing(content)
        if content.timeline:
            from dmoe.observe.report.rank_pictures import timeline

            sections["timeline"] = [timeline(content.timeline)]
        if content.memory:
            sections["memory"] = _memory(content)
    return sections


def _experts(experts: Experts, png: bool) -> list[Picture]:
    from dmoe.observe import expert_plots

    past = experts.past
    pictures = [expert_plots.load_imbalance(past), expert_plots.router_entropy(past)]
    if has(past.records, "router_confidence"):
        pictures.append(expert_plots.router_confidence(past))
    if has(past.records, "dropped"):
        pictures.append(expert_plots.dropped_tokens(past))
    if experts.dead_windows.any():
        pictures.append(expert_plots.dead_experts(past, experts.dead_windows))
    pictures.append(expert_plots.final_load(past))
    if png:  # a file only
        pictures.append(expert_plots.load_heat_map(past, *experts.log_ratios))
    return [*pictures, expert_plots.aux_loss_curve(past.records), expert_plots.z_loss_curve(past.records)]


def _ranks(run: Run, content: Content) -> list[Picture]:
    from dmoe.observe.report import rank_pictures

    names = content.experts.past.layers if content.experts else []
    number = content.rank_lines[-1]["rank_load"].shape[0]
    pictures = [rank_pictures.rank_load(content.rank_lines, names if len(names) == number else list(range(number)))]
    if has(run.train, "ep_imbalance"):
        pictures.append(rank_pictures.ep_imbalance(run.train))
    if has(run.train, "ep_imbalance_cost"):
        pictures.append(rank_pictures.ep_imbalance_cost(run.train))
    return pictures


def _routing(content: Content) -> list[Picture]:
    from dmoe.observe.report import routing_pictures

    assert content.routing is not None
    pictures = [routing_pictures.confidence(content.routing)]
    if len(content.routing.steps_S) > 1:
        pictures += [routing_pictures.drift_next(content.routing), routing_pictures.drift_last(content.routing)]
    return pictures


def _memory(content: Content) -> list[Picture]:
    from dmoe.observe.report import rank_pictures

    worst = content.memory["worst"]
    pictures = [rank_pictures.memory_peak(content.memory["ranks"], content.memory["estimate"])]
    if any(worst["phases"].values()):
        pictures.append(rank_pictures.memory_phases(worst))
    if worst["curve"]:
        pictures.append(rank_pictures.memory_curve(worst))
    return pictures
