"""Stands in for torchvision where the real one does not import: the host asks for it at start and uses none of it here."""
