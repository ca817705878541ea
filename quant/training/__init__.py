"""Training of quantised layers against the float network's own outputs; no data but what the sampler calls it with."""
