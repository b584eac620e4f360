"""What the evaluations share: reading tables, the result folder, the result page."""
