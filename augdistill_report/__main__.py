"""`python -m augdistill_report`: the command `augdistill`, where only the package is at hand."""

import sys

from augdistill_report.commands.cli import main

sys.exit(main())
