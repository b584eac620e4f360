"""What evaluations count and how sure they are of it: intervals, paired differences, diversity."""
