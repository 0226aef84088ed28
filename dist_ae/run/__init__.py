"""A run as it lies on the disk, and what a person sees of it."""
