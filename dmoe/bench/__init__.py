"""Timing the expert computation: against dense MLPs of equal FLOPs, and against other ways to compute it."""
