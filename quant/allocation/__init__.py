"""Allocation: how much damage each format does to each layer, and which choice of formats does least within a budget."""
