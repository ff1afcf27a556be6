"""The command line."""

from __future__ import annotations


def main() -> None:
    """Run the command line; see `trtune.cli.commands.main`."""
    from trtune.cli.commands import main as run

    run()
