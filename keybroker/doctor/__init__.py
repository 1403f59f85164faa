"""What could go wrong between Claude Code and a gateway, found before it does.

What is set anywhere is collected (`origins`), which of it counts is worked out (`requests`), and
what is wrong with it is a `Finding`, with the command that mends it. Imported by its command only.
"""
