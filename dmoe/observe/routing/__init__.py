"""How a piece of text is routed: captured, summarised, kept in files, and compared between checkpoints.

accumulator = RoutingAccumulator.of(model)
with capture(model) as captured:
    for ids_BS in batches:
        model(ids_BS)
        accumulator.add_layers(captured.take(), ids_BS.flatten())
save("step-00000400.npz", accumulator.summary(step=400, name="run"))
"""

from dmoe.observe.routing.accumulator import RoutingAccumulator, summarize
from dmoe.observe.routing.capture import Capture, LayerRouting, capture
from dmoe.observe.routing.drift import Drift, drift
from dmoe.observe.routing.files import load, save
from dmoe.observe.routing.summary import RoutingSummary

__all__ = [
    "Capture",
    "Drift",
    "LayerRouting",
    "RoutingAccumulator",
    "RoutingSummary",
    "capture",
    "drift",
    "load",
    "save",
    "summarize",
]
