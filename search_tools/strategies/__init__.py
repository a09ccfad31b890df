"""Where a search begins, and which candidate it tries next."""
