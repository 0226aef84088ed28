"""A launcher that Ctrl-C ends at once, also while it waits for other hosts: put it in front of the command.

    python launch/interruptible.py accelerate launch …
    python launch/interruptible.py torchrun …

Both wait inside a call into C++, where Python's own handler of Ctrl-C is not reached. The system's default ends the
process. It holds until the launcher has started processes: from then on the launcher passes Ctrl-C on to them.
"""

import runpy
import signal
import sys

MODULES = {"accelerate": "accelerate.commands.accelerate_cli", "torchrun": "torch.distributed.run"}

if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in MODULES:
        sys.exit("usage: python launch/interruptible.py accelerate|torchrun …")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.path[0] = ""  # as `python -m` has it
    del sys.argv[0]
    runpy.run_module(MODULES[sys.argv[0]], run_name="__main__")
