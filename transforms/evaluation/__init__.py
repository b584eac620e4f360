"""Measuring what a job made: pure functions behind `tamis eval rewrites`, `eval spans` and `eval utility`."""
