"""What a null step carries on, when nothing is computed."""
