"""Models behind two protocols, and the weights they load."""
