"""Run the command line: `python -m fuselm run mine.yaml` does what `fuselm run mine.yaml` does."""

from fuselm.cli.main import main

main()
