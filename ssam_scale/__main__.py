"""`python -m ssam_scale` is `ssam-scale`."""

from ssam_scale.cli.main import main

main()
