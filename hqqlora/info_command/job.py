"""`hqqlora info`, from the options to the table."""

from __future__ import annotations

import json

from hqqlora.command.errors import UsageError
from hqqlora.command.packages import require
from hqqlora.info_command.contents import read_contents
from hqqlora.info_command.errors_of_layers import relative_errors
from hqqlora.info_command.options import InfoOptions
from hqqlora.info_command.table import as_values, format_contents


def run(options: InfoOptions) -> None:
    """Does what `hqqlora info` was asked for.

    Raises:
        UsageError: a folder or an option is at fault.
        OSError: the picture cannot be written; names it.
    """
    if options.plot is not None:
        require("matplotlib")
    contents = read_contents(options.folder)
    errors = None
    if options.against is not None:
        if not contents.layers:
            raise UsageError(f"--against: {options.folder} is a {contents.kind}")
        errors = relative_errors(contents.layers, options.against)
    if options.json:
        print(json.dumps(as_values(contents, errors), indent=2))
    else:
        print(format_contents(contents, errors, options.layers))
    if options.plot is not None:
        from hqqlora.info_command.plot import draw

        draw(contents, errors, options.plot, options.folder.resolve().name)
        if not options.json:
            print(f"drawn: {options.plot}")
