"""python -m executorch_moe.export.cli"""

from .app import main

main()
