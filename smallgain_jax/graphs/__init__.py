"""Energy graphs: their terms, and the ways to descend on them."""
