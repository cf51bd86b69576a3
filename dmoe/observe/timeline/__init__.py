"""Where the time of a step goes on each rank, and which rank the others wait for: `StepTimeline`.

marks.py       what is heard during a step: regions, waits and the router's backward, with times
waits.py       when a rank waits for a collective
parts.py       marks to seconds of each region
stragglers.py  the rule that names a rank
summary.py     files of the ranks to one summary, found stragglers
picture.py     the summary as a picture
tool.py        all of it as a tool of a run
"""

from dmoe.observe.timeline.tool import StepTimeline

__all__ = ["StepTimeline"]
