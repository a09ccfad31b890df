"""Empty; see the package."""
