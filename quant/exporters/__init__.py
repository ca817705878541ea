"""Plans and quantised networks in the forms that other libraries read."""
