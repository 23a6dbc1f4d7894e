"""Command lines: flags made from the fields of a dataclass, and errors that a user can read."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
import typing

import torch


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that states a default where there is one to state."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default in (None, False, "", [])
        return action.help if silent else super()._get_help_string(action)


class HelpAll(argparse.Action):
    """--help-all: the help with that of rare flags."""

    def __call__(self, parser: Parser, *_: object) -> None:
        for action, text in parser.rare:
            action.help = text
        parser.epilog = None
        parser.print_help()
        parser.exit()


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations; an unknown flag is answered with the nearest ones, or with all.

    A flag added with rare=True is left out of --help; --help-all shows it.
    """

    def __init__(self, **kwargs):
        self.rare: list[tuple[argparse.Action, str]] = []
        super().__init__(allow_abbrev=False, formatter_class=Help, **kwargs)

    def add_argument(self, *names: str, rare: bool = False, **kwargs) -> argparse.Action:
        action = super().add_argument(*names, **kwargs)
        if rare:
            if not self.rare:
                suppressed = argparse.SUPPRESS
                super().add_argument(
                    "--help-all", action=HelpAll, nargs=0, default=suppressed, help=suppressed
                )
            self.rare.append((action, action.help))
            action.help = argparse.SUPPRESS
            self.epilog = f"--help-all shows {len(self.rare)} more flags."
        return action

    def parse_args(self, args=None, namespace=None):
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [s for a in self._actions for s in a.option_strings if s.startswith("--")]
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=3, cutoff=0.7)
            self.error(
                f"unknown argument {unknown[0]}; "
                + (
                    f"did you mean {' or '.join(near)}?"
                    if near
                    else f"the flags are {' '.join(sorted(flags))}"
                )
            )
        return namespace


def boolean(text: str) -> bool:
    """The value of a yes/no flag."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


def integers(text: str) -> tuple[int, ...]:
    """The value of a flag that takes several whole numbers, "48,96"."""
    try:
        return tuple(int(x) for x in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers like 48,96") from None


def add_fields(parser: argparse.ArgumentParser, cls: type) -> None:
    """A flag for every field of a dataclass: type from its annotation, help and choices from its metadata.

    A flag that is not given is None in the result, so that defaults can come from a named configuration.
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        kind = {bool: boolean, int: int, float: float, str: str}.get(hint, integers)
        choices, default = field.metadata.get("choices"), field.default
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            dest=field.name,
            type=kind,
            default=None,
            choices=choices,
            help=field.metadata["help"] + (f" [{shown}]" if shown != "" else ""),
            metavar=None if choices else field.name.upper(),
        )


def setting(default, help: str, choices: tuple | None = None):
    """A dataclass field that explains itself on the command line."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def check_range(args: argparse.Namespace, **bounds: tuple[float, float]) -> None:
    """ValueError for the first flag whose value is not within its (least, most)."""
    for name, (low, high) in bounds.items():
        value = getattr(args, name)
        if not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be from {low} to {high}")


def tune_torch() -> None:
    """Two settings that make small models on CPUs about three times as fast; on GPUs the first means TF32.

    "medium" hands float32 products to oneDNN, which is twice as fast as MKL on AMD processors and as exact
    there. On processors with AMX it rounds their inputs to bfloat16, and is no faster for models of this
    size: where a product comes out rounded, the setting is taken back. Gradients that fade out become
    denormal numbers, with which arithmetic is slow; they are flushed to zero.
    """
    torch.set_float32_matmul_precision("medium")
    x = torch.full((256, 256), 1 + 2.0**-12)  # bfloat16 would make it 1
    if not torch.cuda.is_available() and not torch.equal(x @ torch.eye(256), x):
        torch.set_float32_matmul_precision("highest")
    torch.set_flush_denormal(True)


def run(main) -> typing.NoReturn:
    """Run a command; a user's mistake ends in one line and status 2, an interrupt in status 130."""
    try:
        main()
    except KeyboardInterrupt as stop:
        print(f"\ninterrupted{': ' + str(stop) if str(stop) else ''}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0]
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", reason):
            raise  # a bug of ours: the traceback is wanted
        print(f"error: not enough memory for this ({reason or 'MemoryError'})", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
