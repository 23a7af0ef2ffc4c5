"""What `capsule` can do with sandboxes: the table that its group reads."""

from __future__ import annotations

from capsule.cli.lazy import Lazy

COMMANDS = {
    "attach": Lazy("capsule.cli.execs", "attach", "Come back to a detached process or terminal."),
    "completion": Lazy("capsule.cli.completion", "completion", "Print what makes a shell complete our commands."),
    "cp": Lazy("capsule.cli.copying", "cp", "Copy files and directories into and out of a sandbox."),
    "exec": Lazy("capsule.cli.execs", "exec_", "Run a program in a sandbox."),
    "kill": Lazy("capsule.cli.processes", "kill", "Send a signal to a process of a sandbox."),
    "login": Lazy("capsule.cli.login", "login", "Remember who you are on this machine."),
    "logout": Lazy("capsule.cli.login", "logout", "Forget what `capsule login` stored."),
    "logs": Lazy("capsule.cli.processes", "logs", "Print what a detached process has written."),
    "ps": Lazy("capsule.cli.processes", "ps", "List the processes of a sandbox."),
    "sandbox": Lazy("capsule.cli.sandboxes", "sandbox", "Create, list, pause, fork and end sandboxes."),
    "template": Lazy("capsule.cli.templates", "template", "Make, list and delete what sandboxes start from."),
}
