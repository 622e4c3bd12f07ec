"""What attention costs, measured against what users would pick instead: `python -m benchmarks`.

One file, one benchmark: `Settings` with its `QUICK` and `FULL` forms, `measure(settings, repeats)`, whose
results go to JSON, and `section(results)`, which is all that the table knows of them.
"""
