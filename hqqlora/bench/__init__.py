"""`hqqlora bench`: this library and its rivals at the same work, side by side."""
