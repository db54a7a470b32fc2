"""The command line: `python -m engine.run [command] [--config study.toml] [--section.key value]`."""

from __future__ import annotations

import sys

from engine.run.process import foreign_package

if _sentence := foreign_package():
    print(f"error: {_sentence}", file=sys.stderr)
    sys.exit(2)
try:
    from engine.run.command_line import main
except KeyboardInterrupt:
    sys.exit(130)

__all__ = ["main"]
