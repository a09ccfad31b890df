"""Whether a cheap fitness ranks schedules as a dear one does."""
