"""The losses of a model: their shares of the margin, and how they balance."""
