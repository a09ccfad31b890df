"""The headless search: finds a schedule for one very run, against that run's own output."""
