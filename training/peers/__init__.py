"""What one would run instead of our engines, to be timed beside them."""
