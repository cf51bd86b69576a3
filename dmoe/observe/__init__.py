"""Looking at a run: the metrics log, the HTML report, and whatever else measures without changing the result."""
