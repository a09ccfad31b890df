"""Small models without a host: networks, samplers, sampling."""
