"""Stands in for torchaudio where the real one does not import: the host asks for it at start and uses none of it here."""
