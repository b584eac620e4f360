"""The jobs people run: one module a job, and the command line."""
