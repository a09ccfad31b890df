"""The multi-stage framework (Zhang et al., arXiv 2312.09181): stretches of noise levels, each with a network of its own."""
