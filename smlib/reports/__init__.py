"""What was reached: evaluation with intervals, tables over seeds, plots."""
