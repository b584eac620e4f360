"""What the flex template's launcher runs.

A file of its own, for run as a script `pipelines/launch.py` would put its folder, and with it `pipelines/inspect.py`,
in front of the standard library.
"""

from pipelines.launch import main

main()
