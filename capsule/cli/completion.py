"""`capsule completion`: what makes a shell complete commands, options, and ids of sandboxes."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from capsule.cli.failures import Failure
from capsule.cli.output import json_option, show

PROGRAM = "capsule"
VARIABLE = "_CAPSULE_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@json_option
@click.pass_context
def completion(context: click.Context, *, shell: str, as_json: bool) -> None:
    """Print what makes SHELL complete our commands.

    \b
    bash:  echo 'eval "$(capsule completion bash)"' >> ~/.bashrc
    zsh:   echo 'eval "$(capsule completion zsh)"' >> ~/.zshrc
    fish:  capsule completion fish > ~/.config/fish/completions/capsule.fish
    """  # noqa: D301 - \b is click's: these lines stay as they are
    found = get_completion_class(shell)
    if found is None:
        raise Failure(f"there is no completion for {shell}")
    script = found(context.find_root().command, {}, PROGRAM, VARIABLE)
    text = script.source_template % script.source_vars()  # source() starts the shell, to see how old it is
    show({"shell": shell, "script": text}, as_json=as_json, text=text)
