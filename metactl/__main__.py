"""`python -m metactl`: the command line, deaf to folders called `models` or `envs` around it."""

import os
import sys

if __name__ == "__main__":
    # `-m` puts the working directory first on the path; our own packages must win.
    sys.path[:] = [path for path in sys.path if path not in ("", os.getcwd())] + [os.getcwd()]
    from metactl.cli import main

    main()
