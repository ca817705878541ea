"""Teacher trajectories: what students learn from."""
