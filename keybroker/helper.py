"""What Claude Code runs for a key, by a line in its settings that nobody has to type:

    exec '<python>' -IS '<path of this file>' '<socket, or - for the usual one>' '<profile>'

Without a profile, or with -, the default one is meant. Exit status: 0 and the key; or nothing on
stdout, one line on stderr and 2, 69, 74, 75, 77 or 78, as docs/exit-status.md has them.

A program's own file is compiled each time it runs, which for the whole of the helper would take a
fifth of what the interpreter takes. What it loads was compiled once: so `asking` does everything.
"""

import sys
from _frozen_importlib_external import SourceFileLoader  # importlib.machinery's, already loaded

if __name__ == "__main__":
    place = __file__.removesuffix("helper.py") + "asking.py"
    SourceFileLoader("__main__", place).exec_module(sys.modules["__main__"])
