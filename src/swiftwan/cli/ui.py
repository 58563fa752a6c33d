"""``swiftwan ui``: the server with its page."""

from swiftwan.cli.options import takes
from swiftwan.cli.serve import Options, run


@takes(Options)
def ui(options: Options) -> None:
    """Open the page in a browser: generate, watch and compare; the HTTP interface is there too."""
    run(options, page=True)
