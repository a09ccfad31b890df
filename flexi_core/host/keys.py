"""Under which names the pack puts things into a model's options."""

from __future__ import annotations

KEY = "flexiffusion"
JOIN = "flexiffusion_join"  # of what joins two models
STAGED = "flexiffusion_stages"  # of a model with a decoder for each stage
