"""Sources of images, the form they are read in, and the order in which training takes them."""
