"""Upcycling: a mixture-of-experts model from a dense one, tensor by tensor.

    plan.py       what is asked for, and the config that results
    experts.py    the weights of one expert
    source.py     the new model as a `Source`, for the writers of `dmoe.checkpoint.formats`
    deviation.py  whether the new model computes what the dense one does, and how far off it is
    compare.py    the same, measured on text
    write.py      all of it, from a directory to a directory

From Python, `upcycle_model` makes a model in memory of one in memory.
"""

from dmoe.checkpoint.upcycle.deviation import Preservation, preservation
from dmoe.checkpoint.upcycle.plan import UpcyclePlan
from dmoe.checkpoint.upcycle.source import ModelSource, UpcycledSource, upcycle_model

__all__ = ["ModelSource", "Preservation", "UpcyclePlan", "UpcycledSource", "preservation", "upcycle_model"]
