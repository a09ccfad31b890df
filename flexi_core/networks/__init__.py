"""How part of a network is run, by its family."""
