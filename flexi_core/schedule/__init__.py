"""Schedules as values: their text, their files, and those that are ready."""
