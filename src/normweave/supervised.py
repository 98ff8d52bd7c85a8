"""`python -m normweave.supervised …`: a command of normweave that ends with the process that started it.

That process keeps the standard input open, and the system closes it when the process ends, even by SIGKILL.
"""

import os
import threading

ENDED = 130
"""Exit code if the other process has ended, as after Ctrl+C."""


def end_with_input() -> None:
    """End this process at the end of the standard input."""
    while os.read(0, 1024):
        pass
    os._exit(ENDED)


if __name__ == "__main__":
    from normweave.cli import main

    threading.Thread(target=end_with_input, daemon=True).start()
    main()
