"""What makes a step acceptable: the box, Armijo's condition, the guard."""
