"""The longer commands of the command line, one module each; `remanence.cli` parses, these work.

Each has `add(commands, shape)`, which declares its options, and imports what it works with only when it runs.
"""
