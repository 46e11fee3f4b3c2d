"""python -m executorch_moe.export.cli"""

from executorch_moe.export.cli import main

main()
