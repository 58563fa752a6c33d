"""``swiftwan ui``: the server with its page."""

from swiftwan.cli.serve import Options, run, takes_options


@takes_options
def ui(options: Options) -> None:
    """Open the page in a browser: generate, watch and compare; the HTTP interface is there too."""
    run(options, page=True)
