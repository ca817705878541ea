"""Methods: from a network and calibration data to a plan and its arrays."""
