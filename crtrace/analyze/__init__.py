"""What can be said about a chain without its target: is it whole, what is in it."""
