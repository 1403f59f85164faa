"""What Claude Code runs for its status line, by its path, as `helper.py` is for a key:

    exec '<python>' -IS '<path of this file>' '<socket, or - for the usual one>' '<profile>'

`connect --statusline` writes that; people type `keybroker statusline`. See `glance`.
"""

import sys

if __name__ == "__main__":
    sys.path.append(__file__.removesuffix("/keybroker/statusline.py"))  # after Python's own
    from keybroker.glance import run

    run(sys.argv[1:])
