"""What is fitted, and by what: a plan as free numbers, its run, and three ways to improve the numbers."""
