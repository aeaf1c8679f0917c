"""What a form is fitted to, and how its numbers are rounded."""
