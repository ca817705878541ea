"""Recipes: a sampler, a cache and a quantisation decided together for one model."""
