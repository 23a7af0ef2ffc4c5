"""`capsule`: sandboxes from a terminal, and the commands of who runs the platform.

Nothing is imported before its command is called: the command line for sandboxes starts without the platform's
libraries, and works where only the `client` extra is installed.
"""

from __future__ import annotations

from capsule.cli.commands import COMMANDS
from capsule.cli.lazy import Lazy, LazyGroup

SERVER_COMMANDS = {
    "serve": Lazy("capsule.commands", "serve", "Serve the control plane until SIGTERM.", extra="control"),
    "dev": Lazy(
        "capsule.commands", "dev", "Run PostgreSQL, a control plane and an agent here, until Ctrl-C.", extra="control"
    ),
    "admin": Lazy("capsule.commands", "admin", "Say who the platform's admins are.", extra="control"),
}

main = LazyGroup(
    "capsule",
    {**COMMANDS, **SERVER_COMMANDS},
    help="Capsule: untrusted code in real microVMs.",
)

if __name__ == "__main__":
    main(prog_name="capsule")
