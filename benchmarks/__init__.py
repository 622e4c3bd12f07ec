"""What attention costs, measured against what users would pick instead."""
