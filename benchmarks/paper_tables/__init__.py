"""DeepClean's Tables 1 to 4 made by this package: `python -m benchmarks.paper_tables`."""

import sys
from pathlib import Path

# The examples' networks and scenarios serve here too, and are no package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "examples"))
