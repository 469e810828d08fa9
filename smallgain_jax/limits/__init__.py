"""What an optimizer is stable up to: closed forms, and the one experiment on its own update."""
