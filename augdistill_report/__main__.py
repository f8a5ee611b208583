"""`python -m augdistill_report` runs the command `augdistill`, if only the package is on the path."""

import sys

from augdistill_report.commands.cli import main

sys.exit(main())
