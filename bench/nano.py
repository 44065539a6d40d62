"""Stands in for the package nano when a script of this folder is run by its path.

Python then looks for modules in this folder first, and finds this one. It puts the repository's
folder in the place of this one and hands over to the package. With python -m it is never imported.
"""

import sys
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path[:] = [str(here.parent), *(path for path in sys.path if Path(path).resolve() != here)]
del sys.modules["nano"]
import nano  # noqa: E402, F401
