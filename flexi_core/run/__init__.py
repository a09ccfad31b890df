"""One sampling under a schedule: what each step does, what it costs, what it did."""
