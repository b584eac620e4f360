"""Commands of the `tamis` command that have their own file; each imports what it needs when it is called."""
