"""A study: its candidates, its storage and its workers."""
