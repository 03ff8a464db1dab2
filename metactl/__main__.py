"""`python -m metactl`: the command line, deaf to folders called `models` or `envs` around it."""

import contextlib
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # `-m` puts the working directory first on the path; our own packages must win.
    with contextlib.suppress(FileNotFoundError):  # a directory that is gone hides nothing
        here = os.getcwd()
        if not Path(here).samefile(Path(__file__).parent.parent):
            sys.path[:] = [path for path in sys.path if path not in ("", here)] + [here]
    from metactl.cli import main

    main()
