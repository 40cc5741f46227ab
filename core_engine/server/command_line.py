"""The command line of ``quire serve``, read together with the file that it names."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from quire.server.config_file import read_config_file
from quire.server.engine_flags import engine_flags
from quire.server.flag import Flag
from quire.server.server_flags import server_flags
from quire.utils.suggest import nearest

_EPILOG = """\
MODEL is a folder, a name on the hub, or quire/demo. Names may be written with underscores. A
configuration in YAML has the same names. vLLM's other engine arguments are taken where they ask for
nothing, and refused where they ask for what this version does not offer."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong without listing a hundred flags."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"error: {message}; see {self.prog} --help\n")
        sys.exit(2)


class CommandLine:
    """Reads the arguments of ``quire serve``.

    Parameters
    ----------
    prog : str
        The command's own name.
    """

    def __init__(self, prog: str = "quire serve") -> None:
        flags = [*server_flags(), *engine_flags()]
        self.flags: dict[str, Flag] = {flag.name: flag for flag in flags}
        self._parser = _Parser(
            prog=prog,
            usage=f"{prog} MODEL [flags]",
            description="Serve a model over HTTP, in the way that OpenAI's clients speak.",
            epilog=_EPILOG,
            allow_abbrev=False,
        )
        groups: dict[str, argparse._ArgumentGroup] = {}
        for flag in flags:
            where: argparse._ActionsContainer = self._parser
            if flag.group is not None:
                if flag.group not in groups:
                    groups[flag.group] = self._parser.add_argument_group(flag.group)
                where = groups[flag.group]
            flag.add_to(where)

    def read(self, words: Sequence[str]) -> dict[str, Any]:
        """Return what was given, by name; of a name in both, the command line's value.

        Parameters
        ----------
        words : sequence of str
            Without the command's name. What is wrong in them ends the process with code 2.

        Raises
        ------
        ConfigError
            The file that they name is wrong.
        """
        given = self._parse(words)
        path = given.pop("config", None)
        if path is not None:
            given = self._parse(read_config_file(path, self.flags)) | given
        return given

    def _parse(self, words: Sequence[str]) -> dict[str, Any]:
        namespace, others = self._parser.parse_known_args([_hyphened(word) for word in words])
        given = vars(namespace)
        names = [word for word in others if not word.startswith("-")]
        for word in others:
            if word.startswith("-") and word != "--":
                self._unknown(word.partition("=")[0])
        if len(names) > 1:
            self._parser.error(f"one model is served, not {len(names)}: {' '.join(names)}")
        if names and given.get("model", names[0]) != names[0]:
            self._parser.error(f"MODEL is {names[0]!r}, and --model is {given['model']!r}")
        return given | ({"model": names[0]} if names else {})

    def _unknown(self, word: str) -> NoReturn:
        # A switch is known by its negative, too.
        guess = nearest(
            word, (o for action in self._parser._actions for o in action.option_strings)
        )
        hint = "" if guess is None else f"; did you mean {guess}?"
        self._parser.error(f"there is no {word}{hint}")


def _hyphened(word: str) -> str:
    """Return a word of the command line with hyphens in its flag's name."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word
