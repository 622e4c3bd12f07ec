"""The pictures of runs of every kind are drawn; what they draw is what was recorded."""
