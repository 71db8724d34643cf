"""One command from its words: parse, load the config, plan, run the plan. Imports no torch; the command does, when it plans.

A command module has EXAMPLE, `arguments(parser)`, `plan(config, args)` and `run(plan)`; with CONFIG it takes --config and
overrides: the kind of config that it needs, or None for either. `plan` validates everything and writes nothing, so
--dry-run prints it.
"""

import argparse
import importlib
import os
from typing import Any, NoReturn

from vavae_fast.errors import BadInput, printable


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; see {self.prog} --help")


def run_command(name: str, argv: list[str]) -> None:
    """The command `name` with the words `argv`; what goes wrong is an exception."""
    command = importlib.import_module("vavae_fast.commands." + name.replace("-", "_"))
    args = parse(command, name, argv)
    if args is None:
        return
    config = _config(command, args)
    if args.print_config:
        from vavae_fast.config import to_yaml

        print(to_yaml(config), end="")
        return
    plan = command.plan(config, args)
    if args.dry_run:
        if int(os.environ.get("RANK", 0)) == 0:
            print(printable(plan.describe()))
        return
    command.run(plan)


def parse(command: Any, name: str, argv: list[str]) -> argparse.Namespace | None:
    """The command's arguments beside those of every command; None when --help was asked for and printed."""
    parser = _Parser(prog=f"vavae-fast {name}", description=command.__doc__, epilog=f"example:\n  {command.EXAMPLE}", add_help=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)  # fmt: skip
    if hasattr(command, "CONFIG"):
        parser.add_argument("--config", metavar="FILE", required=True, help="YAML file; the reference's own run unchanged")
    command.arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="validate everything, print what would be done, write nothing")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config as YAML and leave")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("-h", "--help", action="store_true", help="show this and leave")
    if hasattr(command, "CONFIG"):
        parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override config keys; values are YAML")
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        return None
    known, rest = parser.parse_known_args(argv)
    for word in rest:
        if "=" not in word or word.startswith("-") or not hasattr(known, "overrides"):
            parser.error(f"unknown argument {word}")
        known.overrides.append(word)
    return known


def _config(command: Any, args: argparse.Namespace) -> Any:
    if not hasattr(command, "CONFIG"):
        if args.print_config:
            raise BadInput("this command takes no config")
        return None
    from vavae_fast.config import load_config

    return load_config(args.config, tuple(args.overrides), kind=command.CONFIG)
