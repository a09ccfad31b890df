"""Where the run takes place that is searched for, and what is kept of it."""
