"""``python -m commhooks.plan``."""

from commhooks.plan.command_line import main

main()
