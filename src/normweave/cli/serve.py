"""`normweave serve`: a bundle behind REST and a page."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, get_args

import typer

from normweave.cli import options
from normweave.cli.terminal import ALL_NORMAL, Terminal, command
from normweave.errors import ConfigError, DataError, MissingError, unknown

MIB = 2**20
_LIMITS = "Limits"


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "serve")(serve)


def serve(
    terminal: Terminal,
    bundle: options.Bundle,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8080,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of what is kept.", show_default="'inspections' beside the bundle"),
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(help="postgresql://… instead of SQLite in that folder.", show_default=False),
    ] = None,
    watch: Annotated[
        Path | None, typer.Option(help="Folder of a camera to inspect images from.", show_default=False)
    ] = None,
    new_token: Annotated[
        str | None,
        typer.Option(help="Make another token, for an operator or an engineer.", show_default=False),
    ] = None,
    no_token: Annotated[bool, typer.Option("--no-token", help="Ask for none; on this machine only.")] = False,
    tls_certificate: Annotated[
        Path | None, typer.Option(help="PEM file, to be reached by https.", show_default=False)
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key.", show_default=False)] = None,
    keep_days: Annotated[
        float,
        typer.Option(min=0, help="Remove older inspections; 0: never.", rich_help_panel=_LIMITS),
    ] = 0,
    keep_gib: Annotated[
        float,
        typer.Option(min=0, help="Remove the oldest images beyond this; 0: never.", rich_help_panel=_LIMITS),
    ] = 0,
    max_waiting: Annotated[
        int,
        typer.Option(min=1, help="Images that may wait; beyond, the answer is 429.", rich_help_panel=_LIMITS),
    ] = 64,
    max_images: Annotated[int, typer.Option(min=1, help="In one request.", rich_help_panel=_LIMITS)] = 32,
    max_image_mib: Annotated[float, typer.Option(help="Of one image.", rich_help_panel=_LIMITS)] = 32,
    max_megapixels: Annotated[float, typer.Option(help="Of one image.", rich_help_panel=_LIMITS)] = 50,
) -> int:
    """Judge images that come over the network or into a folder, and keep what was said. Needs no torch.

    At the first start a token for each role is made and shown, once.
    """
    if (tls_certificate is None) != (tls_key is None):
        raise ConfigError("TLS takes both: --tls-certificate and --tls-key.")
    if watch is not None and not watch.is_dir():
        raise DataError(f"There is no folder {watch} to follow. Make it first, or leave --watch out.")
    try:
        from normweave import serve as server
        from normweave.serve import process
        from normweave.serve.access import Access
        from normweave.serve.authentication import is_loopback
        from normweave.serve.config import ServeConfig
        from normweave.serve.files import Files
        from normweave.serve.records import Role
        from normweave.serve.service import InspectionService
        from normweave.serve.store import Store
        from normweave.serve.watch import Watch
    except ImportError as error:
        raise MissingError(
            f'To serve, {error.name} is needed, which is not installed: pip install "normweave[serve]"'
        ) from error
    from normweave.detector import Detector

    if no_token and not is_loopback(host):
        raise ConfigError(
            f"--no-token lets everyone who reaches {host} do everything. Listen on 127.0.0.1, or ask for tokens."
        )
    certificate = None
    if tls_certificate is not None and tls_key is not None:
        certificate = tls_certificate, tls_key
        process.check_certificate(*certificate)
    if new_token is not None and new_token not in get_args(Role):
        raise unknown(
            "role", new_token, get_args(Role), "An operator inspects and reviews, an engineer does all."
        )
    config = ServeConfig(
        max_waiting=max_waiting,
        max_images=min(max_images, max_waiting),
        max_image_bytes=int(max_image_mib * MIB),
        max_request_bytes=int(max(128, 2 * max_image_mib) * MIB),
        max_pixels=int(max_megapixels * 1e6),
        keep_days=keep_days,
        keep_gib=keep_gib,
    )
    runtime = Detector.load(bundle, threads=terminal.threads, device=terminal.device)
    folder = bundle.resolve().parent / "inspections" if data is None else data
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        files = Files(folder / server.FILES)
        stack.callback(files.close)
        files.sweep()
        store = Store.open(database or folder / server.DATABASE)
        stack.callback(store.close)
        listening = stack.enter_context(process.listen(host, port))
        access = None if no_token else Access(store, folder=folder, session_hours=config.session_hours)
        made = [] if access is None else access.create_first_tokens()
        if access is not None and new_token is not None:
            made.append(
                access.create(name=new_token, role="engineer" if new_token == "engineer" else "operator")
            )
        service = InspectionService(runtime, store=store, files=files, config=config)
        stack.callback(service.stop)
        app = server.create_app(
            service,
            access=access,
            watch=None if watch is None else Watch(watch.resolve(), service=service),
        )
        address = listening.getsockname()
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        url = f"{'http' if certificate is None else 'https'}://{shown}:{address[1]}"
        if terminal.json:
            tokens = [{"name": one.token.name, "role": one.token.role, "token": one.secret} for one in made]
            terminal.record(
                {"url": url, "bundle_hash": runtime.bundle_hash, "data": str(folder), "tokens": tokens}
            )
        else:
            for one in made:
                terminal.show(f"Token of the {one.token.role}, shown this once: {one.secret}")
            terminal.show(
                f"{bundle} is at work at {url}; what it says is kept in {folder}. Stop it with Ctrl+C."
            )
        if certificate is None and not is_loopback(host):
            terminal.remark(
                "Tokens and images cross the network in the clear: use TLS, or a proxy that does."
            )
        process.run(app, listening, config=config, certificate=certificate)
    return ALL_NORMAL
