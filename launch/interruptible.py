"""A launcher that Ctrl-C ends at once, also while it waits for other hosts: put it in front of the command.

    python launch/interruptible.py accelerate launch …
    python launch/interruptible.py torchrun …

Both wait inside a call into C++, where Python's own handler of Ctrl-C is not reached. The system's default ends the
process. It holds until the launcher has started processes: from then on the launcher passes Ctrl-C on to them.
"""

import importlib.util
import runpy
import signal
import sys

MODULES = {"accelerate": "accelerate.commands.accelerate_cli", "torchrun": "torch.distributed.run"}


def fail(reason: str) -> None:
    print(f"interruptible.py: {reason}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in MODULES:
        fail("usage: python launch/interruptible.py accelerate|torchrun …")
    sys.path[0] = ""  # as `python -m` has it
    module = MODULES[sys.argv[1]]
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        fail(f"{sys.executable} has no {package}; use the Python that dist-ae is installed for (PYTHON=…)")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    del sys.argv[0]
    runpy.run_module(module, run_name="__main__")
