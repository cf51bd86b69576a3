"""Hangs: every rank writes where it is and what it waits for, and `dmoe doctor RUN` names the rank that did not come.

watch.py        a thread that sees when nothing has moved for too long
alarm.py        how the other ranks hear of it
stacks.py       the Python stack of every thread
collectives.py  the last collectives, from torch's flight recorder
messages.py     the last sends and receives, which that recorder lacks on gloo
record.py       what a rank writes, RUN/hang/rank{r}.json, and reading it
diagnosis.py    sentences made of the records of all ranks
run_findings.py what else a run directory tells: stragglers, steps that were not finite, memory that ran out
"""

from dmoe.observe.hang.watch import HangWatch

__all__ = ["HangWatch"]
