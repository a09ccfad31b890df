"""What people are shown of a study."""
