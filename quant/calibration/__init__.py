"""Calibration: what the network's layers see while it draws."""
