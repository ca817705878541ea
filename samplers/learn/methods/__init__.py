"""The published methods, each an objective and a choice of what is free."""
